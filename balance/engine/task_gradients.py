"""Gradients of K losses as the passes of one step leave them, and their weighted sums."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .accumulate import leaf_gradients, without_hooks
from .gramian import HeadGradients, TaskRows, sparse_rows, split_direction, to_vector
from .passes import FeatureOutputs, weighted_pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..types import Direction, Gramian, Jacobian
    from .accumulate import LeafGradient
    from .layers import MeasuredTensor
    from .partition import Partition
    from .passes import Outputs


@dataclass
class TaskGradients:
    """Gradients of K losses.

    Attributes:
        outputs: The outputs at which a further pass begins.
        partition: Leaves of the graph.
        reached_by: For each of ``partition.inputs`` and each task, whether the task reaches it.
        gramian: Inner products, float64. Shape (K, K).
        heads: Gradients of the task-specific parameters.
        rows: The gradients by tensor, if they are stored.
        tensors: The tensors of the rows.
        jacobian: The gradients as one matrix, if a rule sees it. Shape (K, P).
        sparse_dims: By index in ``partition.inputs``, the number of sparse dimensions of its gradients; 0 if one is dense.
    """

    outputs: Outputs
    partition: Partition
    reached_by: list[list[bool]]
    gramian: Gramian = field(default_factory=lambda: torch.empty(0))
    heads: HeadGradients = field(default_factory=lambda: HeadGradients([]))
    rows: TaskRows | None = None
    tensors: Sequence[MeasuredTensor] = ()
    jacobian: Jacobian | None = None
    sparse_dims: dict[int, int] = field(default_factory=dict)

    @property
    def is_reached(self) -> list[bool]:
        """Return for each of ``partition.inputs`` whether any task reaches it."""
        return [any(tasks) for tasks in self.reached_by]

    @property
    def reaching_tasks(self) -> list[bool]:
        """Return for each task whether it reaches any of ``partition.inputs``. Length K."""
        return [any(tasks) for tasks in zip(*self.reached_by, strict=True)]

    @property
    def needs_pass(self) -> bool:
        """Return whether a weighted sum costs a further backward pass."""
        return self.rows is None or self.partition.source == "features"

    def head_lengths(self) -> Tensor:
        """Return the length of each task's gradients of the heads. Shape (K,), float64."""
        return self.heads.lengths(self.gramian.device)

    def heads_are_finite(self, task: int) -> bool:
        """Return whether all entries of a task's gradients of the heads are finite, which their length may not show."""
        return self.heads.is_finite(task)

    def head_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head. ``weights``: length K."""
        return self.heads.weighted_sums(weights)

    def trunk_length(self, weights: Sequence[float]) -> float:
        """Return the length of a weighted sum of the tasks' gradients of the trunk, with the factor of mixed precision.

        Args:
            weights: One for each task. Length K.
        """
        trunk = self.partition.trunk
        if self.rows is not None and not self.needs_pass:
            return length(total for total in self.rows.weighted_sums(weights) if total is not None)
        with without_hooks(trunk):
            gradients = weighted_pass(self.outputs, weights, trunk, retain_graph=True)
        return length(gradient for gradient in gradients if gradient is not None)

    def weighted_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of the trunk. The stored gradients are dropped, so call it once.

        Args:
            weights: One for each task. Length K.
        """
        trunk = self.partition.trunk
        if self.rows is None or self.needs_pass:
            return leaf_gradients(trunk, weighted_pass(self.outputs, weights, trunk))
        sums = []
        triples = zip(self.tensors, self.rows.by_tensor, self.rows.weighted_sums(weights), strict=True)
        for tensor, by_task, total in triples:
            by_task.clear()
            if total is not None:
                sums.append((tensor.tensor, tensor.gradient(total)))
        return sums

    def split(self, direction: Direction) -> list[Tensor | None]:
        """Split a direction into pieces for ``partition.inputs``, sparse where all gradients are sparse.

        Args:
            direction: Shape (P,).

        Returns:
            A piece for each tensor; None if no task reaches it.
        """
        pieces = split_direction(direction, self.partition.inputs, self.is_reached)
        for position, dimensions in self.sparse_dims.items():
            piece = pieces[position]
            pieces[position] = piece.to_sparse(dimensions) if piece is not None and dimensions else piece
        return pieces

    def replace_by_direction(self, pieces: Sequence[Tensor | None]) -> None:
        """Replace the tasks' gradients of the features by one direction, given in pieces as `split` returns them."""
        self.rows = TaskRows.of_one_task(pieces)
        self.outputs = FeatureOutputs(self.partition.inputs, self.rows)

    def allocate_jacobian(self, device: torch.device) -> None:
        """Allocate a matrix of zeros for the gradients, in the widest dtype of the tensors, at least float32."""
        inputs = self.partition.inputs
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), torch.float32)
        length = sum(tensor.numel() for tensor in inputs)
        self.jacobian = torch.zeros(self.outputs.num_tasks, length, dtype=dtype, device=device)

    def store(
        self, task: int, gradients: Sequence[Tensor | None], tensors: Sequence[MeasuredTensor], rows: TaskRows, sharers: int
    ) -> None:
        """Store the gradients that the pass of one task has computed.

        Args:
            task: Index of the task.
            gradients: One for each of ``tensors``; further gradients are ignored.
            tensors: Tensors to which the pass went down.
            rows: Rows to which the task's row is added: flat, or sparse until `common_indices`.
            sharers: Number of tasks whose gradients share one storage.
        """
        places: Sequence[Tensor | None] = [None] * len(tensors)
        if self.jacobian is not None:
            places = torch.split(self.jacobian[task], [tensor.tensor.numel() for tensor in tensors])
        for by_task, gradient, place in zip(rows.by_tensor, gradients, places, strict=False):
            by_task.append(_row(gradient, place, sharers))
        self.note_sparse(tensors, gradients)

    def note_sparse(self, tensors: Sequence[MeasuredTensor], gradients: Sequence[Tensor | None]) -> None:
        """Note which gradients of one pass are sparse; surplus gradients are ignored."""
        for tensor, gradient in zip(tensors, gradients, strict=False):
            if gradient is not None:
                dimensions = gradient.sparse_dim() if gradient.is_sparse else 0
                self.sparse_dims[tensor.position] = min(dimensions, self.sparse_dims.get(tensor.position, dimensions))

    def note_reached(self, tensors: Sequence[MeasuredTensor], rows: TaskRows) -> None:
        """Note which tasks reach which tensors, given their rows."""
        for tensor, by_task in zip(tensors, rows.by_tensor, strict=True):
            self.reached_by[tensor.position] = [row is not None for row in by_task]


def length(gradients: Iterable[Tensor]) -> float:
    """Return the length of some gradients, taken as one vector."""
    squares = [torch.linalg.vector_norm(g.to_dense()).double().cpu().square() for g in gradients]
    return math.sqrt(float(sum(squares)))


def _row(gradient: Tensor | None, place: Tensor | None, sharers: int) -> Tensor | None:
    """Return one task's gradient of one tensor as it is stored."""
    if gradient is None:
        return None
    if gradient.is_sparse and place is None:
        return gradient
    row = to_vector(gradient, sharers)
    return row if place is None else place.copy_(row)


def common_indices(tensors: Sequence[MeasuredTensor], rows: TaskRows) -> list[MeasuredTensor]:
    """Replace sparse gradients in rows by dense values at common indices.

    Args:
        tensors: Tensors of the rows.
        rows: Changed in place; flat gradients stay as they are.

    Returns:
        The tensors, with the indices.
    """
    updated = []
    for i, tensor in enumerate(tensors):
        by_task = rows.by_tensor[i]
        sparse = sparse_rows(by_task)
        if sparse is not None:
            rows.by_tensor[i] = list(sparse.rows)
            updated.append(tensor._replace(sparse=sparse._replace(rows=[])))
            continue
        if any(row is not None and row.is_sparse for row in by_task):
            rows.by_tensor[i] = [None if row is None else to_vector(row) for row in by_task]
        updated.append(tensor)
    return updated
