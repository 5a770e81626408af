"""Gradients of K tasks as one matrix, for networks of which an operation costs more than the numbers that it moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .gramian import gramian_of
from .task_gradients import TaskGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..types import Jacobian
    from .accumulate import LeafGradient
    from .gramian import HeadGradients
    from .partition import Partition
    from .passes import Outputs

# Numbers in the gradients of all tasks, up to which one matrix is faster than gradients by tensor
_SMALL = 1 << 17
_SMALL_IN_A_BATCH = 1 << 21  # where one batched pass computes them


def is_small(partition: Partition, num_tasks: int, *, batched: bool) -> bool:
    """Return whether the gradients of K tasks are few enough for one matrix, and of one kind.

    Args:
        partition: Leaves of the graph.
        num_tasks: Number of tasks, K.
        batched: Whether one batched pass computes them.
    """
    numbers = num_tasks * sum([tensor.numel() for tensor in partition.inputs])  # noqa: C419 - faster than a generator
    if not 0 < numbers <= (_SMALL_IN_A_BATCH if batched else _SMALL):
        return False
    dtype, device = partition.inputs[0].dtype, partition.inputs[0].device
    leaves = [*partition.inputs, *partition.heads]
    return dtype in (torch.float32, torch.float64) and all([t.dtype == dtype and t.device == device for t in leaves])  # noqa: C419


@dataclass
class MatrixGradients(TaskGradients):
    """Gradients of K losses: one row of a matrix for each task, and one vector with the gradients of all heads.

    Attributes:
        matrix: Gradients of the shared parameters, zero where a task does not reach one. Shape (K, P).
        of_heads: The heads and their gradients, task by task.
        flat_heads: These gradients in one vector.
        head_sizes: Numbers of each task's gradients of the heads. Length K.
    """

    matrix: Jacobian = field(default_factory=lambda: torch.empty(0, 0))
    of_heads: Sequence[LeafGradient] = ()
    flat_heads: Tensor = field(default_factory=lambda: torch.empty(0))
    head_sizes: Sequence[int] = ()

    @classmethod
    def of(
        cls, outputs: Outputs, partition: Partition, matrix: Jacobian, reached_by: list[list[bool]], heads: HeadGradients
    ) -> MatrixGradients:
        """Return gradients with their Gramian.

        Args:
            outputs: The outputs at which a further pass begins.
            partition: Leaves of the graph.
            matrix: The attribute.
            reached_by: For each of ``partition.inputs`` and each task, whether the task reaches it.
            heads: Gradients of the heads, dense.
        """
        of_heads = [pair for pairs in heads.by_task for pair in pairs]
        sizes = [sum([gradient.numel() for _, gradient in pairs]) for pairs in heads.by_task]  # noqa: C419
        flat = _flatten_dense_tensors([gradient for _, gradient in of_heads]) if of_heads else matrix.new_zeros(0)  # type: ignore[no-untyped-call]
        gradients = cls(outputs, partition, reached_by, gramian_of(matrix), heads)
        gradients.matrix, gradients.of_heads, gradients.flat_heads, gradients.head_sizes = matrix, of_heads, flat, sizes
        return gradients

    @property
    def needs_pass(self) -> bool:
        """Return False: a weighted sum is a product with the matrix."""
        return False

    def head_lengths(self) -> Tensor:
        """Return a bound on the length of each task's gradients of the heads: the length of all. Shape (K,), float64."""
        bound: Tensor = torch.linalg.vector_norm(self.flat_heads, dtype=torch.float64)
        return bound.expand(len(self.head_sizes))

    def head_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head. ``weights``: length K."""
        heads = [head for head, _ in self.of_heads]
        if not heads or weights.count(1.0) == len(weights) or len(set(map(id, heads))) < len(heads):
            return super().head_sums(weights)
        factors = torch.from_numpy(np.repeat(weights, self.head_sizes)).to(self.flat_heads)
        return list(zip(heads, _split(self.flat_heads * factors, heads), strict=True))

    def weighted_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of the trunk. ``weights``: length K."""
        inputs = self.partition.inputs
        direction = torch.from_numpy(np.array(weights)).to(self.matrix) @ self.matrix
        triples = zip(inputs, _split(direction, inputs), self.reached_by, strict=True)
        return [(tensor, piece) for tensor, piece, tasks in triples if True in tasks]


def matrix_of_rows(tensors: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]]) -> Jacobian:
    """Return the matrix of gradients that passes have computed one after the other.

    Args:
        tensors: The tensors on which conflict is measured; P numbers.
        gradients: By task, the dense gradients of ``tensors``; further ones are ignored.

    Returns:
        Shape (K, P).
    """
    pieces = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for row in gradients
        for tensor, gradient in zip(tensors, row, strict=False)
    ]
    flat: Tensor = _flatten_dense_tensors(pieces)  # type: ignore[no-untyped-call]
    return flat.view(len(gradients), -1)


def matrix_of_stacks(tensors: Sequence[Tensor], stacks: Sequence[Tensor | None], num_tasks: int) -> Jacobian:
    """Return the matrix of gradients that one batched pass has computed.

    Args:
        tensors: The tensors on which conflict is measured; P numbers.
        stacks: For each of them the gradients of all tasks, of shape (K, ...); further ones are ignored.
        num_tasks: Number of tasks, K.

    Returns:
        Shape (K, P).
    """
    pairs = zip(tensors, stacks, strict=False)
    pieces = [
        tensor.new_zeros(num_tasks, tensor.numel()) if stack is None else stack.reshape(num_tasks, -1)
        for tensor, stack in pairs
    ]
    return torch.cat(pieces, dim=1)


def _split(vector: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return consecutive parts of a vector in the shapes of some tensors."""
    pieces: Sequence[Tensor] = _unflatten_dense_tensors(vector, tensors)  # type: ignore[no-untyped-call]
    return pieces
