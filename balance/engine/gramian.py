"""Gradients by tensor and task, and their inner products.

Gradients are never averaged or approximated: rows are the results of autograd. They are gradients of the raw losses. A loss
balancer acts on them as a (K, K) matrix, which is exact for any rule and costs next to nothing.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from .accumulate import gradient_sum

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..types import Direction, Gramian, Jacobian, Losses, WeightedLosses
    from .accumulate import LeafGradient

_HALF = (torch.float16, torch.bfloat16)
# Numbers that are in float64 at once, unless a share of all gradients is less
_IN_DOUBLE = 1 << 19
_IN_DOUBLE_ON_ACCELERATOR = 1 << 24
_SHORT = 1 << 16  # numbers of which an operation costs more than the copy or the products
# Columns of a Jacobian that are replaced at once
_COLUMNS = 20_000
_COLUMNS_ON_ACCELERATOR = 50 * _COLUMNS


@dataclass
class TaskRows:
    """Gradients of K tasks with respect to some tensors.

    Attributes:
        num_tasks: Number of tasks, K.
        by_tensor: For each tensor and each task, the gradient, flat; None where the task does not reach the tensor.
    """

    num_tasks: int
    by_tensor: list[list[Tensor | None]]

    @classmethod
    def of_one_task(cls, gradients: Sequence[Tensor | None]) -> TaskRows:
        """Return rows for K = 1, given a gradient for each tensor, of any shape."""
        return cls(1, [[None if gradient is None else to_vector(gradient)] for gradient in gradients])

    def weighted_sums(self, weights: Sequence[float] | Tensor) -> Iterator[Tensor | None]:
        """Yield the weighted sum of the tasks' gradients, tensor by tensor.

        Args:
            weights: One for each task; a tensor is not copied to the host. Length K.

        Yields:
            A flat tensor, at least float32; None if no task reaches the tensor.
        """
        for by_task in self.by_tensor:
            yield _weighted_sum(by_task, weights)

    def squares(self, device: torch.device) -> Tensor:
        """Return the squared lengths of the tasks' gradients. Shape (K,), float64, on ``device``."""
        total = torch.zeros(self.num_tasks, dtype=torch.float64, device=device)
        for by_task in self.by_tensor if self.num_tasks else ():
            norms = [
                total.new_zeros(()) if row is None else torch.linalg.vector_norm(row, dtype=torch.float64).to(total)
                for row in by_task
            ]
            total += torch.stack(norms).square()
        return total

    def gramian(self, device: torch.device, roots: Sequence[Tensor] | None = None) -> Gramian:
        """Return the inner products of the tasks' gradients. Shape (K, K), float64, on ``device``.

        Args:
            device: Device of the result.
            roots: For each tensor, factors on its coordinates, flat.
        """
        if not self.num_tasks:
            return torch.zeros(0, 0, dtype=torch.float64, device=device)
        products = InnerProducts(self.num_tasks, sum(map(_row_length, self.by_tensor)), device)
        for position, by_task in enumerate(self.by_tensor):
            root = None if roots is None else roots[position]
            products.add([row if row is None or root is None else row * root for row in by_task])
        return products.total()


def _weighted_sum(by_task: Sequence[Tensor | None], weights: Sequence[float] | Tensor) -> Tensor | None:
    first = next((row for row in by_task if row is not None), None)
    if first is None:
        return None
    total: Tensor | None = None
    if isinstance(weights, torch.Tensor):
        dtype = torch.promote_types(first.dtype, torch.float32)
        for row, factor in zip(by_task, weights.to(first.device, dtype).unbind(), strict=True):
            if row is not None:
                total = row.to(dtype) * factor if total is None else total.addcmul_(row.to(dtype), factor)
        return total
    for row, weight in zip(by_task, weights, strict=True):
        if row is not None:
            wide = row.to(torch.promote_types(row.dtype, torch.float32))
            total = wide * weight if total is None else total.add_(wide, alpha=weight)
    return total


def _row_length(by_task: Sequence[Tensor | None]) -> int:
    return next((len(row) for row in by_task if row is not None), 0)


class InnerProducts:
    """Inner products of K tasks' gradients, which arrive tensor by tensor, accumulated in float64.

    Args:
        num_tasks: Number of tasks, K.
        length: Length of one task's gradient over all tensors, in numbers.
        device: Device of the result.
        lean: Use less memory, which is slower.
    """

    def __init__(self, num_tasks: int, length: int, device: torch.device, *, lean: bool = False) -> None:
        numbers = _IN_DOUBLE if device.type == "cpu" else _IN_DOUBLE_ON_ACCELERATOR
        share = max(length // 64, 4096) if lean else max(length // 16, 20_000)
        columns = max(min(numbers // num_tasks, share, length), 1)
        # One matrix for all tensors: small tensors go next to each other, and fresh memory is slow
        self._columns = torch.empty(num_tasks, columns, dtype=torch.float64, device=device)
        self._filled = 0
        self._sum = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
        self._by_row = device.type == "cpu" and 3 < num_tasks <= 16  # where a product of matrices is slower

    def add(self, rows: Sequence[Tensor | None]) -> None:
        """Add the inner products of the tasks' gradients with respect to one tensor.

        Args:
            rows: By task, the gradient, flat; None is zero. Length K.
        """
        length = _row_length(rows)
        begin = 0
        while begin < length:
            end = min(begin + self._columns.shape[1] - self._filled, length)
            self._fill(self._columns[:, self._filled : self._filled + end - begin], rows, begin, end)
            self._filled += end - begin
            begin = end
            if self._filled == self._columns.shape[1]:
                self._multiply()

    @staticmethod
    def _fill(columns: Tensor, rows: Sequence[Tensor | None], begin: int, end: int) -> None:
        """Copy a part of each row, in one operation if the part is short."""
        if columns.numel() <= _SHORT and not any(row is None for row in rows):
            columns.copy_(torch.stack([row[begin:end] for row in rows if row is not None]))
            return
        for column, row in zip(columns.unbind(), rows, strict=True):
            if row is None:
                column.zero_()
            else:
                column.copy_(row[begin:end])

    def total(self) -> Gramian:
        """Return the inner products over all tensors so far. Shape (K, K)."""
        self._multiply()
        return self._sum.triu() + self._sum.triu(1).T if self._by_row else self._sum.clone()

    def _multiply(self) -> None:
        if not self._filled:
            return
        J = self._columns[:, : self._filled]
        self._filled = 0
        if not self._by_row or J.numel() <= _SHORT:
            self._sum.addmm_(J, J.T)
            return
        for i in range(len(J)):  # only the upper half
            self._sum[i, i:].addmv_(J[i:], J[i])


@dataclass
class HeadGradients:
    """Gradients of K losses with respect to the task-specific parameters.

    Attributes:
        by_task: For each task, the parameters that it reaches and their gradients.
    """

    by_task: list[list[LeafGradient]]

    def add(self, task: int, heads: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of a task.

        Args:
            task: Index of the task, at most the number of tasks so far.
            heads: Task-specific parameters.
            gradients: One for each of ``heads``; None where the task does not reach it.
        """
        if task == len(self.by_task):
            self.by_task.append([])
        is_reached = map(operator.is_not, gradients, itertools.repeat(None))  # without Python's loop over K heads
        pairs: Iterator[LeafGradient] = itertools.compress(zip(heads, gradients, strict=True), is_reached)  # type: ignore[arg-type]
        self.by_task[task] += pairs

    def lengths(self, device: torch.device) -> Tensor:
        """Return the length of each task's gradients, computed in float32 or wider. Shape (K,), float64."""
        counts = [len(pairs) for pairs in self.by_task]
        if not any(counts):
            return torch.zeros(len(counts), dtype=torch.float64, device=device)
        norms = _norms([_real_values(g) for pairs in self.by_task for _, g in pairs], device)
        if min(counts) == max(counts):
            lengths: Tensor = torch.linalg.vector_norm(norms.view(len(counts), -1), dim=1)
            return lengths
        return torch.stack([torch.linalg.vector_norm(part) for part in torch.split(norms, counts)])

    def is_finite(self, task: int) -> bool:
        """Return whether all entries of a task's gradients are finite, which their length in float32 may not show."""
        return all(bool(_real_values(g).isfinite().all()) for _, g in self.by_task[task])

    def weighted_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head.

        Args:
            weights: One for each task. Length K.

        Returns:
            The heads that a task reaches, and the sums; at least float32, except for the unchanged gradient of one task.
        """
        pairs = [pair for by_head in self.by_task for pair in by_head]
        is_reached_once = len({id(head) for head, _ in pairs}) == len(pairs)
        if not pairs or (is_reached_once and all(weight == 1.0 for weight in weights)):
            return pairs
        factors = [weight for weight, by_head in zip(weights, self.by_task, strict=True) for _ in by_head]
        sums: dict[int, LeafGradient] = {}
        for (head, gradient), weight, product in zip(pairs, factors, _products(pairs, factors), strict=True):
            before = sums.get(id(head))
            new = gradient if weight == 1.0 and before is None else product
            sums[id(head)] = (head, new if before is None else gradient_sum(before[1], new))
        return list(sums.values())


class SparseRows(NamedTuple):
    """Sparse gradients of K tasks with respect to one tensor, as dense values at the indices that any task reaches.

    Attributes:
        rows: By task, the flat values at these indices; None where a task does not reach the tensor.
        indices: Shape (sparse dimensions, n).
        shape: Shape of the tensor.
    """

    rows: list[Tensor | None]
    indices: Tensor
    shape: torch.Size

    def values_of(self, tensor: Tensor) -> Tensor:
        """Return the values of a dense tensor at the indices, in their order."""
        return tensor[tuple(self.indices)]

    def gradient(self, values: Tensor) -> Tensor:
        """Return flat values at the indices as a sparse tensor, coalesced."""
        dense = values.view(self.indices.shape[1], *self.shape[len(self.indices) :])
        return torch.sparse_coo_tensor(self.indices, dense, self.shape, is_coalesced=True, check_invariants=False)


def sparse_rows(gradients: Sequence[Tensor | None]) -> SparseRows | None:
    """Return sparse gradients of one tensor at common indices.

    Args:
        gradients: By task; None where a task does not reach the tensor.

    Returns:
        None if a gradient is dense, or no task reaches the tensor.
    """
    present = [g.coalesce() for g in gradients if g is not None and g.is_sparse]
    if not present or len(present) < sum(g is not None for g in gradients):
        return None
    all_indices = torch.cat([g.indices() for g in present], dim=1)
    indices, places = all_indices.unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    pairs = iter(zip(present, places.split([g.indices().shape[1] for g in present]), strict=True))
    rows: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is None:
            rows.append(None)
            continue
        sparse, place = next(pairs)
        values = sparse.values()
        dense = values.new_zeros(indices.shape[1], *values.shape[1:])
        rows.append(to_vector(dense.index_copy_(0, place, values)))
    return SparseRows(rows, indices, present[0].shape)


def to_vector(gradient: Tensor, sharers: int = 1) -> Tensor:
    """Return a gradient as a vector of real numbers that keeps no more memory alive than it needs.

    Args:
        gradient: Of any shape.
        sharers: Number of rows that share the storage of this one.

    Returns:
        Shape (numbers,), or of a complex gradient its real and imaginary parts.
    """
    gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
    vector = (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).reshape(-1)
    is_wasteful = vector.untyped_storage().nbytes() > 2 * sharers * vector.numel() * vector.element_size()
    return vector.clone() if is_wasteful else vector


def from_vector(vector: Tensor, tensor: Tensor) -> Tensor:
    """Return a vector of real numbers in the shape of a tensor, complex if the tensor is complex."""
    if tensor.is_complex():
        return torch.view_as_complex(vector.view(*tensor.shape, 2))
    return vector.view(tensor.shape)


def split_direction(direction: Direction, tensors: Sequence[Tensor], is_reached: Sequence[bool]) -> list[Tensor | None]:
    """Split a direction into one piece for each tensor, in its shape.

    Args:
        direction: Shape (P,).
        tensors: Tensors of P numbers in all.
        is_reached: For each tensor, whether any task reaches it.

    Returns:
        The pieces; None for a tensor that no task reaches.
    """
    parts = torch.split(direction, [tensor.numel() for tensor in tensors])
    triples = zip(parts, tensors, is_reached, strict=True)
    return [part.view(tensor.shape) if reached else None for part, tensor, reached in triples]


def gramian_of(matrix: Jacobian) -> Gramian:
    """Return the inner products of the rows of a matrix. Shape (K, P) -> (K, K), float64."""
    if matrix.numel() <= _IN_DOUBLE:
        J = matrix.double()
        return J @ J.T
    products = InnerProducts(len(matrix), matrix.shape[1], matrix.device)
    products.add(list(matrix.unbind()))
    return products.total()


def multiply_rows(jacobian: Jacobian, matrix: Tensor) -> None:
    """Replace a Jacobian by a matrix times it, in place, without a second Jacobian.

    Args:
        jacobian: Shape (K, P).
        matrix: Shape (K, K).
    """
    matrix = matrix.to(jacobian)
    at_once = _COLUMNS if jacobian.device.type == "cpu" else _COLUMNS_ON_ACCELERATOR
    for columns in torch.split(jacobian, at_once, dim=1):
        columns.copy_(matrix @ columns)


def loss_jacobian(weighted: WeightedLosses, losses: Losses) -> Tensor:
    """Return the derivative of the weighted losses: entry (i, j) is ∂weighted_i/∂losses_j.

    Args:
        weighted: The loss balancer's output. Shape (K,).
        losses: Its input, a leaf of its graph. Shape (K,).

    Returns:
        Shape (K, K), float64.
    """
    rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    if weighted is not losses:
        options: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            (rows,) = torch.autograd.grad(weighted, losses, rows, is_grads_batched=True, **options)
        except RuntimeError:  # the rule has an operation that cannot be batched
            rows = torch.stack([torch.autograd.grad(weighted, losses, row, **options)[0] for row in rows.unbind()])
    return rows.detach().double()


def _products(pairs: Sequence[LeafGradient], factors: Sequence[float]) -> Sequence[Tensor]:
    """Return gradients times numbers, in float32 or wider."""
    gradients = [gradient.float() if gradient.dtype in _HALF else gradient for _, gradient in pairs]
    if any(gradient.is_sparse for gradient in gradients):
        return [factor * gradient for factor, gradient in zip(factors, gradients, strict=True)]
    products: Sequence[Tensor] = torch._foreach_mul(gradients, factors)
    return products


def _norms(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the length of each gradient, computed in float32 or wider. Shape (n,), float64."""
    kinds = {(g.dtype, g.device) for g in gradients}
    if len(kinds) == 1 and kinds <= {(torch.float32, device), (torch.float64, device)}:
        return torch.stack(torch._foreach_norm(gradients)).double()
    dtypes = [torch.promote_types(g.dtype, torch.float32) for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    return torch.stack([norm.to(device, torch.float64) for norm in norms])


def _real_values(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
