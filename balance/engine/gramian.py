"""Gradients by tensor and task, and their inner products.

Gradients are never averaged or approximated: autograd's own results are the rows. Rows are gradients of the *raw* losses.
A loss balancer acts on them as a K x K matrix (`loss_jacobian`), which is exact for any rule and costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from balance.engine.accumulate import added

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from balance.engine.accumulate import LeafGradient
    from balance.types import Direction, Gramian, Jacobian, Losses, WeightedLosses

_HELD = 1 << 19  # numbers that are held in float64 at once, if they are no more than a share of all
_HELD_ON_ACCELERATOR = 1 << 24
_COLUMNS = 20_000  # of a Jacobian that are replaced at once


@dataclass
class Rows:
    """Gradients of K tasks with respect to some tensors, each flat; None where a task does not reach a tensor."""

    num_tasks: int
    pieces: list[list[Tensor | None]]  # [tensor][task]

    @property
    def reached(self) -> list[bool]:
        """For each tensor, whether any task reaches it."""
        return [any(row is not None for row in own) for own in self.pieces]

    def combined(self, weights: Sequence[float] | Tensor) -> Iterator[Tensor | None]:
        """Yield the weighted sum of the tasks' gradients for one tensor after the other, flat, at least float32.

        Args:
            weights: One for each task; a tensor is not copied to the host. Shape (K,)
        """
        for by_task in self.pieces:
            yield _combined(by_task, weights)

    def squares(self, device: torch.device) -> Tensor:
        """Return the squared lengths of the tasks' gradients, float64. Shape (K,)."""
        total = torch.zeros(self.num_tasks, dtype=torch.float64, device=device)
        for by_task in self.pieces if self.num_tasks else ():
            norms = [
                total.new_zeros(()) if row is None else torch.linalg.vector_norm(row, dtype=torch.float64).to(total)
                for row in by_task
            ]
            total += torch.stack(norms).square()
        return total

    def gramian(self, device: torch.device) -> Gramian:
        """Return the inner products of the tasks' gradients, float64. Shape (K, K)."""
        if not self.num_tasks:
            return torch.zeros(0, 0, dtype=torch.float64, device=device)
        products = InnerProducts(self.num_tasks, sum(map(_length, self.pieces)), device)
        for by_task in self.pieces:
            products.add(by_task)
        return products.total()


def _combined(by_task: Sequence[Tensor | None], weights: Sequence[float] | Tensor) -> Tensor | None:
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


def _length(by_task: Sequence[Tensor | None]) -> int:
    return next((len(row) for row in by_task if row is not None), 0)


class InnerProducts:
    """Inner products of K tasks' gradients, which come tensor by tensor, accumulated in float64.

    Args:
        num_tasks: K.
        length: How many numbers a gradient has in all.
        device: Where the result is wanted.
        lean: Hold less at once, which is slower.
    """

    def __init__(self, num_tasks: int, length: int, device: torch.device, *, lean: bool = False) -> None:
        numbers = _HELD if device.type == "cpu" else _HELD_ON_ACCELERATOR
        share = max(length // 64, 4096) if lean else max(length // 16, 20_000)
        columns = max(min(numbers // num_tasks, share, length), 1)
        # One matrix for all tensors: small ones go side by side, and fresh memory is slow
        self._columns = torch.empty(num_tasks, columns, dtype=torch.float64, device=device)
        self._filled = 0
        self._sum = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
        self._by_row = device.type == "cpu" and 3 < num_tasks <= 16  # where a product of matrices is slower

    def add(self, rows: Sequence[Tensor | None]) -> None:
        """Add the tasks' gradients with respect to one tensor, flat; None is zero."""
        length = _length(rows)
        taken = 0
        while taken < length:
            stop = min(taken + self._columns.shape[1] - self._filled, length)
            places = self._columns[:, self._filled : self._filled + stop - taken]
            for place, row in zip(places.unbind(), rows, strict=True):
                if row is None:
                    place.zero_()
                else:
                    place.copy_(row[taken:stop])
            self._filled += stop - taken
            taken = stop
            if self._filled == self._columns.shape[1]:
                self._multiply()

    def total(self) -> Gramian:
        """Return the inner products over all tensors so far. Shape (K, K)."""
        self._multiply()
        return self._sum + self._sum.triu(1).T if self._by_row else self._sum.clone()

    def _multiply(self) -> None:
        J = self._columns[:, : self._filled]
        self._filled = 0
        if not self._by_row:
            self._sum.addmm_(J, J.T)
            return
        for i in range(len(J)):  # the upper half
            self._sum[i, i:].addmv_(J[i:], J[i])


@dataclass
class HeadGradients:
    """Gradients of K losses with respect to the task-specific parameters, where a task reaches them.

    Attributes:
        rows: By task, parameters and their gradients.
    """

    rows: list[list[LeafGradient]]

    def append(self, heads: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of the next task."""
        self.rows.append([(head, g) for head, g in zip(heads, gradients, strict=True) if g is not None])

    def lengths(self, device: torch.device) -> Tensor:
        """Return the length of each task's gradients, as far as float32 holds it. Shape (K,), float64."""
        entries = [(k, _real_values(g)) for k, row in enumerate(self.rows) for _, g in row]
        squares = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        if entries:
            tasks = torch.tensor([k for k, _ in entries], device=device)
            wide = [torch.promote_types(g.dtype, torch.float32) for _, g in entries]
            norms = [
                torch.linalg.vector_norm(g, dtype=d).to(device, torch.float64) for (_, g), d in zip(entries, wide, strict=True)
            ]
            squares.index_add_(0, tasks, torch.stack(norms).square())
        return squares.sqrt()

    def is_finite(self, task: int) -> bool:
        """Whether no entry of a task's gradients is infinite or NaN, where their length in float32 may have overflowed."""
        return all(bool(_real_values(g).isfinite().all()) for _, g in self.rows[task])

    def weighted(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head, at least float32. ``weights``: (K,)."""
        found: dict[int, LeafGradient] = {}
        for weight, row in zip(weights, self.rows, strict=True):
            for head, gradient in row:
                if weight != 1.0 or id(head) in found:
                    gradient = weight * gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # noqa: PLW2901
                before = found.get(id(head))
                found[id(head)] = (head, gradient if before is None else added(before[1], gradient))
        return list(found.values())


class SparseRows(NamedTuple):
    """Sparse gradients of K tasks with respect to one tensor, as dense numbers at the places that any task touches.

    Attributes:
        rows: By task, flat values at these places; None where a task does not reach the tensor.
        indices: The places. Shape (sparse dimensions, n).
        shape: Shape of the tensor.
    """

    rows: list[Tensor | None]
    indices: Tensor
    shape: torch.Size

    def gradient(self, values: Tensor) -> Tensor:
        """Return values at the places as a sparse tensor."""
        return sparse_tensor(values, self.indices, self.shape)


def sparse_rows(gradients: Sequence[Tensor | None]) -> SparseRows | None:
    """Bring sparse gradients of one tensor to common places; None if there is a dense gradient, or none at all."""
    present = [g.coalesce() for g in gradients if g is not None and g.is_sparse]
    if not present or len(present) < sum(g is not None for g in gradients):
        return None
    together = torch.cat([g.indices() for g in present], dim=1)
    places, where = together.unique(dim=1, return_inverse=True)  # type: ignore[no-untyped-call]
    own = iter(zip(present, where.split([g.indices().shape[1] for g in present]), strict=True))
    rows: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is None:
            rows.append(None)
            continue
        values, at = next(own)
        dense = values.values().new_zeros(places.shape[1], *values.values().shape[1:])
        rows.append(flat(dense.index_copy_(0, at, values.values())))
    return SparseRows(rows, places, present[0].shape)


def sparse_tensor(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Return flat values at the given places as a coalesced sparse tensor."""
    dense = values.view(indices.shape[1], *shape[len(indices) :])
    return torch.sparse_coo_tensor(indices, dense, shape, is_coalesced=True, check_invariants=False)


def flat(gradient: Tensor, sharers: int = 1) -> Tensor:
    """Return a gradient as a vector of real numbers that keeps no more memory alive than it needs.

    Args:
        gradient: Of any shape; of a complex one the real and imaginary parts.
        sharers: How many rows share the storage of which this one is a part.
    """
    gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach()
    vector = (torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient).reshape(-1)
    spare = vector.untyped_storage().nbytes() > 2 * sharers * vector.numel() * vector.element_size()
    return vector.clone() if spare else vector


def unflat(vector: Tensor, tensor: Tensor) -> Tensor:
    """Return a vector of real numbers in the shape of a tensor, complex if that is."""
    if tensor.is_complex():
        return torch.view_as_complex(vector.view(*tensor.shape, 2))
    return vector.view(tensor.shape)


def _real_values(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def loss_jacobian(weighted: WeightedLosses, losses: Losses) -> Tensor:
    """Return the derivative of the weighted losses: entry (i, j) is ∂weighted_i/∂losses_j. Shape (K, K), float64."""
    rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    if weighted is not losses:
        options: dict[str, bool] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        try:
            (rows,) = torch.autograd.grad(weighted, losses, rows, is_grads_batched=True, **options)
        except RuntimeError:  # the rule has an operation that cannot be batched
            rows = torch.stack([torch.autograd.grad(weighted, losses, row, **options)[0] for row in rows.unbind()])
    return rows.detach().double()


def change_rows(jacobian: Jacobian, matrix: Tensor) -> None:
    """Replace a Jacobian (K, P) by ``matrix`` (K, K) times it, in place, with no second Jacobian."""
    matrix = matrix.to(jacobian)
    for columns in torch.split(jacobian, _COLUMNS if jacobian.device.type == "cpu" else 50 * _COLUMNS, dim=1):
        columns.copy_(matrix @ columns)


def pieces(direction: Direction, tensors: Sequence[Tensor], reached: Sequence[bool]) -> list[Tensor | None]:
    """Cut a direction into pieces for the tensors; None for a tensor that no task reaches."""
    cuts = torch.split(direction, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) if there else None for piece, tensor, there in zip(cuts, tensors, reached, strict=True)]
