"""The autograd function of a splitter: K views of the features, whose gradients are merged into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from ..engine.gramian import TaskRows, to_vector
from .feature_gradients import FeatureGradients

if TYPE_CHECKING:
    from torch import Tensor

    from ..distributed.ranks import Ranks


@dataclass
class PassMemory:
    """Results of the first backward pass over a graph, which later passes over it repeat.

    Attributes:
        rule_state: State of the gradient balancer before that pass.
        orders: Random orders of the tasks.
        averages: For each task whether it has been counted, and the average that its gradient was divided by. Shape (K,) each.
    """

    rule_state: dict[str, Any] | None = None
    orders: list[list[int]] | None = None
    averages: tuple[Tensor, Tensor] | None = None


class Merger(Protocol):
    """A module that merges the tasks' gradients of the features."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""

    def merge(self, gradients: FeatureGradients, memory: PassMemory) -> list[Tensor | None]:
        """Return the gradient of each feature tensor, flat; None for an unreached tensor."""


class Split(torch.autograd.Function):
    """K views of each feature tensor; in the backward pass a `Merger` merges their gradients."""

    @staticmethod
    def forward(ctx: Any, merger: Merger, *features: Tensor) -> tuple[Tensor, ...]:
        """Return the views, K for the first tensor, K for the second, and so on."""
        ctx.set_materialize_grads(False)  # an absent task differs from a task whose gradient is zero
        ctx.merger, ctx.memory = merger, PassMemory()
        ctx.like = [(z.shape, z.dtype, z.device) for z in features]
        ctx.batch = num_samples(features[0])
        return tuple(z.view_as(z) for z in features for _ in merger.tasks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the merged gradient of each feature tensor."""
        K = len(ctx.merger.tasks)
        by_tensor = [gradients[i * K : (i + 1) * K] for i in range(len(ctx.like))]
        tasks = [k for k in range(K) if any(rows[k] is not None for rows in by_tensor)]
        if not tasks and ctx.merger.ranks.size == 1:
            return (None,) * (1 + len(by_tensor))
        device = ctx.like[0][2]
        pieces = [[None if (g := rows[k]) is None else to_vector(g) for k in tasks] for rows in by_tensor]
        lengths = [shape.numel() for shape, _, _ in ctx.like]
        with torch.autocast(device.type, enabled=False):
            indices = torch.tensor(tasks, dtype=torch.int64, device=device)
            arrived = FeatureGradients(TaskRows(len(tasks), pieces), tasks, indices, lengths, ctx.batch)
            merged = ctx.merger.merge(arrived, ctx.memory)
        like = zip(by_tensor, merged, ctx.like, strict=True)
        return (
            None,
            *(
                None if piece is None or all(row is None for row in rows) else piece.reshape(shape).to(where, dtype)
                for rows, piece, (shape, dtype, where) in like
            ),
        )


def num_samples(tensor: Tensor) -> int:
    """Return the size of a tensor's first dimension; 1 for a scalar."""
    return tensor.shape[0] if tensor.ndim else 1
