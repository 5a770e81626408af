"""Projections of task gradients, sample by sample, from one Gramian for each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..solvers.projection import project_in_turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def inner_products(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the Gramian of every sample, float64.

    Args:
        samples: Gradients of each feature tensor. Shape (B, k, f) each.
        device: Device of the result.

    Returns:
        Shape (B, k, k).
    """
    wide = [J.double() for J in samples]
    return torch.stack([(J @ J.transpose(1, 2)).to(device) for J in wide]).sum(dim=0)


def project_samples(gramians: Tensor, orders: Tensor) -> Tensor:
    """Return every task's gradient, projected off the gradients that it conflicts with, as a combination of the gradients.

    Args:
        gramians: Shape (B, k, k).
        orders: Row i lists the other tasks in the order in which task i meets them. Shape (k, k - 1).

    Returns:
        Entry (b, i, j): coefficient of gradient j in the projected gradient i. Shape (B, k, k).
    """
    orders, tasks = orders.to(gramians.device), torch.arange(gramians.shape[1], device=gramians.device)
    return project_in_turn(gramians, orders.unbind(dim=1), tasks, _identity(gramians))


def shortest_between(gramians: Tensor) -> Tensor:
    """Return the weights of the shortest vector between two gradients; a single gradient has weight 1.

    Args:
        gramians: Shape (B, k, k), k at most 2.

    Returns:
        Shape (B, k).
    """
    if gramians.shape[1] < 2:
        return torch.ones_like(gramians[:, 0])
    a, b, ab = gramians[:, 0, 0], gramians[:, 1, 1], gramians[:, 0, 1]
    distance = a + b - 2 * ab
    first = torch.where(distance != 0, (b - ab) / distance, 0.0).clamp(0, 1)
    return torch.stack([first, 1 - first], dim=1)


def _identity(gramians: Tensor) -> Tensor:
    return torch.eye(gramians.shape[1], dtype=gramians.dtype, device=gramians.device).repeat(len(gramians), 1, 1)
