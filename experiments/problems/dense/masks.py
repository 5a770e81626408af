"""The pixels that count, in the codes of the papers and here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance.messages import unknown
from experiments.problems.base import PROTOCOLS

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.problems.base import ProtocolName

IGNORED = -1


def check_protocol(protocol: ProtocolName) -> None:
    """Check the name of a protocol.

    Raises:
        ValueError: If it is neither ``sound`` nor ``paper``.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(unknown("protocol", protocol, PROTOCOLS))


def valid_labels(labels: Tensor) -> Tensor:
    """Return a mask of the pixels with a class. Shape (B, H, W) -> (B, H, W)."""
    return labels != IGNORED


def valid_depth(depth: Tensor) -> Tensor:
    """Return a mask of the pixels with a measured depth, or inverse depth: not zero. Shape (B, 1, H, W) -> (B, 1, H, W)."""
    return depth != 0


def valid_normals(normals: Tensor, protocol: ProtocolName = "sound") -> Tensor:
    """Return a mask of the pixels with a normal.

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
