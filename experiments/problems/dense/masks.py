"""Which pixels count, in the codes of the papers and here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from balance.messages import unknown

if TYPE_CHECKING:
    from torch import Tensor

Rules = Literal["sound", "paper"]
IGNORED = -1


def check_rules(protocol: Rules) -> None:
    """Refuse a misspelt protocol.

    Raises:
        ValueError: If it is neither ``sound`` nor ``paper``.
    """
    if protocol not in get_args(Rules):
        raise ValueError(unknown("protocol", protocol, get_args(Rules)))


def valid_labels(labels: Tensor) -> Tensor:
    """Pixels with a class. Shape (B, H, W) -> (B, H, W)."""
    return labels != IGNORED


def valid_depth(depth: Tensor) -> Tensor:
    """Pixels where the sensor saw something: the depth, or inverse depth, is not zero. Shape (B, 1, H, W) -> the same."""
    return depth != 0


def valid_normals(normals: Tensor, protocol: Rules = "sound") -> Tensor:
    """Pixels with a normal.

    Args:
        normals: All three components are zero where there is none. Shape (B, 3, H, W).
        protocol: ``sound``: a component is not zero. ``paper``: the sum of the components is not zero, which also drops
            normals such as (0.6, -0.6, 0).

    Returns:
        Shape (B, H, W).
    """
    if protocol == "paper":
        return normals.sum(dim=1) != 0
    return (normals != 0).any(dim=1)
