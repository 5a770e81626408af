"""Losses -> task gradients, tensor by tensor -> Gramian; weights -> ``.grad``. All backward passes of the library are here.

Gradients are never averaged or approximated, and the Jacobian is never put together from pieces: autograd's own results are its
rows. Rows are taken of the *raw* losses; what a loss balancer does to them is a K x K matrix (`loss_jacobian`), which is exact
for any rule and costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from balance.graph import Root
    from balance.shapes import Direction, Gramian, Jacobian, Losses, WeightedLosses

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

    def combined(self, weights: Sequence[float]) -> Iterator[Tensor | None]:
        """Weighted sum of the tasks' gradients for one tensor after the other, flat, at least float32."""
        for own in self.pieces:
            total = None
            for row, weight in zip(own, weights, strict=True):
                if row is None:
                    continue
                row = row.to(torch.promote_types(row.dtype, torch.float32))  # noqa: PLW2901
                total = row * weight if total is None else total.add_(row, alpha=weight)
            yield total


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
        """Take the tasks' gradients with respect to one tensor, flat; None is zero."""
        length = next((len(row) for row in rows if row is not None), 0)
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
        """Their sum over all tensors so far. Shape (K, K)."""
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
class AtLosses:
    """Backward passes that begin at the losses."""

    roots: Sequence[Root | None]  # [task]; None: a loss without a graph
    one: Tensor  # what each pass begins with: 1, or the factor of mixed precision. Shape ()

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.roots)

    @property
    def device(self) -> torch.device:
        """Where it all is."""
        return self.one.device

    def of_task(self, k: int) -> tuple[list[Root], list[Tensor]]:
        """Where the pass of task k begins, and with what gradients."""
        root = self.roots[k]
        return ([], []) if root is None else ([root], [self.one])

    def together(self, weights: Sequence[float]) -> tuple[list[Root], list[Tensor]]:
        """The same for the weighted sum of all tasks."""
        pairs = [(root, self.one * weight) for root, weight in zip(self.roots, weights, strict=True) if root is not None]
        return [root for root, _ in pairs], [gradient for _, gradient in pairs]

    def side_by_side(self) -> tuple[list[Root], list[Tensor]]:
        """The same for all tasks in one batched pass, gradients of shape (K, ...)."""
        columns = (self.one * torch.eye(self.num_tasks, dtype=self.one.dtype, device=self.one.device)).unbind()
        pairs = [(root, column) for root, column in zip(self.roots, columns, strict=True) if root is not None]
        return [root for root, _ in pairs], [column for _, column in pairs]


@dataclass
class AtFeatures:
    """Backward passes that begin at features, whose gradients are known; as `AtLosses`."""

    features: Sequence[Tensor]
    rows: Rows

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.rows.num_tasks

    @property
    def device(self) -> torch.device:
        """Where it all is."""
        return self.features[0].device

    def of_task(self, k: int) -> tuple[list[Root], list[Tensor]]:
        """The features that task k reaches, and their gradients."""
        there = [(z, own[k]) for z, own in zip(self.features, self.rows.pieces, strict=True)]
        return [z for z, row in there if row is not None], [row.view(z.shape) for z, row in there if row is not None]

    def together(self, weights: Sequence[float]) -> tuple[list[Root], list[Tensor]]:
        """The features, and the weighted sums of their gradients."""
        there = [(z, total) for z, total in zip(self.features, self.rows.combined(weights), strict=True) if total is not None]
        return [z for z, _ in there], [total.view(z.shape).to(z) for z, total in there]

    def side_by_side(self) -> tuple[list[Root], list[Tensor]]:
        """The features, and their gradients of all tasks, zero where there are none. Shape (K, ...) each."""
        outputs: list[Root] = []
        gradients = []
        for z, own in zip(self.features, self.rows.pieces, strict=True):
            if any(row is not None for row in own):
                nothing = torch.zeros_like(z)
                outputs.append(z)
                gradients.append(torch.stack([nothing if row is None else row.view(z.shape) for row in own]))
        return outputs, gradients


Start = AtLosses | AtFeatures


@dataclass
class HeadGradients:
    """Gradients of K losses with respect to the task-specific parameters, as far as they are reached."""

    rows: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)  # [task]: parameters and their gradients

    def append(self, heads: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take the next task's gradients."""
        self.rows.append([(head, g) for head, g in zip(heads, gradients, strict=True) if g is not None])

    def sums(self, device: torch.device) -> Tensor:
        """Sum of all entries of each task's gradients, finite if all of them are. Shape (K,), float64."""
        entries = [(k, g.coalesce().values() if g.is_sparse else g) for k, row in enumerate(self.rows) for _, g in row]
        totals = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        if entries:
            tasks = torch.tensor([k for k, _ in entries], device=device)
            sums = [g.sum(dtype=torch.promote_types(g.dtype, torch.float32)).to(device) for _, g in entries]
            totals.index_add_(0, tasks, torch.stack(sums).double())
        return totals

    def accumulate(self, weights: Sequence[float]) -> None:
        """Add the weighted sum of the tasks' gradients to ``.grad`` of each head. ``weights``: (K,)."""
        for weight, row in zip(weights, self.rows, strict=True):
            for head, gradient in row:
                accumulate(head, gradient if weight == 1.0 else weight * gradient, fresh=weight != 1.0)


def one_by_one(start: Start, inputs: Sequence[Root], *, keep: bool, apart: bool = False) -> Iterator[Sequence[Tensor | None]]:
    """One backward pass for each task: its gradients with respect to ``inputs``, None where it does not reach one.

    Args:
        start: Where the passes begin.
        inputs: Tensors of the graph, or edges of it.
        keep: Keep the graph after the last pass.
        apart: The passes have no node in common: each frees its own part of the graph, and ``keep`` is for the rest.
    """
    begins = [start.of_task(k) for k in range(start.num_tasks)]
    last = max((k for k, (outputs, _) in enumerate(begins) if outputs), default=-1)
    for k, (outputs, gradients) in enumerate(begins):
        if not inputs or not outputs:
            yield [None] * len(inputs)
            continue
        retain = not apart and (keep or k != last)
        yield torch.autograd.grad(outputs, inputs, gradients, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]


def all_at_once(start: Start, inputs: Sequence[Root], *, keep: bool) -> list[Sequence[Tensor | None]]:
    """The same in one pass for all tasks together, which holds K gradients of everything on its way.

    Raises:
        RuntimeError: If an operation cannot be batched.
    """
    outputs, gradients = start.side_by_side()
    if not inputs or not outputs:
        return [[None] * len(inputs) for _ in range(start.num_tasks)]
    found = torch.autograd.grad(
        outputs,  # type: ignore[arg-type]
        inputs,  # type: ignore[arg-type]
        gradients,
        retain_graph=keep,
        allow_unused=True,
        is_grads_batched=True,
    )
    return [[None if own is None else own[k] for own in found] for k in range(start.num_tasks)]


def backward(start: Start, weights: Sequence[float], parameters: Sequence[Tensor], *, keep: bool = False) -> None:
    """One ordinary backward pass of the weighted sum of all tasks, which accumulates in ``.grad`` of the parameters."""
    outputs, gradients = start.together(weights)
    if isinstance(start, AtFeatures):
        start.rows.pieces.clear()  # not needed any more, and as large as the features, K times
    if outputs and parameters:
        torch.autograd.backward(outputs, gradients, retain_graph=keep, inputs=list(parameters))  # type: ignore[arg-type]


def flat(gradient: Tensor, sharers: int = 1) -> Tensor:
    """A gradient as a vector that keeps no more memory alive than it needs, for as many as share what it is a part of."""
    vector = (gradient.to_dense() if gradient.is_sparse else gradient).detach().reshape(-1)
    spare = vector.untyped_storage().nbytes() > 2 * sharers * vector.numel() * vector.element_size()
    return vector.clone() if spare else vector


def loss_jacobian(weighted: WeightedLosses, losses: Losses) -> Tensor:
    """How the weighted losses depend on the losses: entry (i, j) is ∂weighted_i/∂losses_j. Shape (K, K), float64."""
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


def accumulate(parameter: Tensor, gradient: Tensor, *, fresh: bool = False) -> None:
    """Add to ``parameter.grad``, in place where there is one, as ``loss.backward()`` does.

    Args:
        parameter: A leaf.
        gradient: As many numbers.
        fresh: Nobody else holds it, so that it may become ``.grad`` itself.
    """
    given, gradient = gradient, gradient.detach().to(parameter)
    if gradient.shape != parameter.shape:
        gradient = gradient.reshape(parameter.shape)
    if parameter.grad is None:
        parameter.grad = gradient if fresh or given.dtype != gradient.dtype else gradient.clone()
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient + parameter.grad
    else:
        parameter.grad += gradient


def add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float = 1.0) -> None:
    """Add gradients, where there are any, times a factor to ``.grad`` of their parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            accumulate(parameter, gradient if factor == 1.0 else factor * gradient)


def pieces(direction: Direction, tensors: Sequence[Tensor], reached: Sequence[bool]) -> list[Tensor | None]:
    """A direction cut up for the tensors that it is for, None for those that no task reaches."""
    cuts = torch.split(direction, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) if there else None for piece, tensor, there in zip(cuts, tensors, reached, strict=True)]
