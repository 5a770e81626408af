"""Backward passes: where they begin, one for each task or all in one batch, and what arrives at the tensors in question."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._vmap_internals import _vmap

from balance.engine.accumulate import without_hooks
from balance.engine.gramian import Rows, unflat
from balance.engine.graph import edge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from balance.engine.graph import Root


@dataclass
class AtLosses:
    """Backward passes that begin at the losses.

    Attributes:
        roots: By task, where its loss is in the graph; None for a loss without a graph.
        one: Gradient with which every pass begins: 1, or the factor of mixed precision. Shape ()
    """

    roots: Sequence[Root | None]
    one: Tensor

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.roots)

    @property
    def device(self) -> torch.device:
        """Device of the losses."""
        return self.one.device

    def entered(self) -> AbstractContextManager[None]:
        """Return a context for passes that begin here."""
        return nullcontext()

    def of_task(self, k: int) -> tuple[list[Root], list[Tensor]]:
        """Return where the pass of task k begins, and with what gradients."""
        root = self.roots[k]
        return ([], []) if root is None else ([root], [self.one.clone()])  # a Function may change it in place

    def together(self, weights: Sequence[float]) -> tuple[list[Root], list[Tensor]]:
        """Return the same for one pass of the weighted sum of all tasks."""
        pairs = [(root, self.one * weight) for root, weight in zip(self.roots, weights, strict=True) if root is not None]
        return [root for root, _ in pairs], [gradient for _, gradient in pairs]

    def side_by_side(self) -> tuple[list[Root], list[Tensor]]:
        """Return the same for one batched pass of all tasks; gradients of shape (K, ...)."""
        columns = (self.one * torch.eye(self.num_tasks, dtype=self.one.dtype, device=self.one.device)).unbind()
        pairs = [(root, column) for root, column in zip(self.roots, columns, strict=True) if root is not None]
        return [root for root, _ in pairs], [column for _, column in pairs]


@dataclass
class AtFeatures:
    """Backward passes that begin at features whose gradients are known; as `AtLosses`.

    The hooks of the features have acted on these gradients already, so they are off during the passes.
    """

    features: Sequence[Tensor]
    rows: Rows

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.rows.num_tasks

    @property
    def device(self) -> torch.device:
        """Device of the first features."""
        return self.features[0].device

    def entered(self) -> AbstractContextManager[None]:
        """Return a context for passes that begin here."""
        return without_hooks(self.features)

    def of_task(self, k: int) -> tuple[list[Root], list[Tensor]]:
        """Return the features that task k reaches, and copies of their gradients."""
        pairs = [(z, own[k]) for z, own in zip(self.features, self.rows.pieces, strict=True)]
        return (
            [z for z, row in pairs if row is not None],
            [unflat(row.clone(), z) for z, row in pairs if row is not None],  # a Function may change them in place
        )

    def together(self, weights: Sequence[float]) -> tuple[list[Root], list[Tensor]]:
        """Return the features, and the weighted sums of their gradients."""
        pairs = [(z, total) for z, total in zip(self.features, self.rows.combined(weights), strict=True) if total is not None]
        return [z for z, _ in pairs], [unflat(total, z).to(z) for z, total in pairs]

    def side_by_side(self) -> tuple[list[Root], list[Tensor]]:
        """Return the features, and their gradients of all tasks, zero where there are none. Shape (K, ...) each."""
        outputs: list[Root] = []
        gradients = []
        for z, own in zip(self.features, self.rows.pieces, strict=True):
            if any(row is not None for row in own):
                nothing = torch.zeros_like(z)
                outputs.append(z)
                gradients.append(torch.stack([nothing if row is None else unflat(row, z) for row in own]))
        return outputs, gradients


Start = AtLosses | AtFeatures


class _Arrivals:
    """Gradients as they enter the nodes of some edges, after all hooks.

    Where the engine also runs a node, what it captures there is the gradient before the hooks; our hook on the node comes
    last and sees what the node gets. Where the node does not run, what is captured has passed the hooks.
    """

    def __init__(self, inputs: Sequence[Root]) -> None:
        self.found: dict[int, Tensor | None] = {}
        inner = [(place, target) for place, target in enumerate(inputs) if not (isinstance(target, Tensor) and target.is_leaf)]
        self._edges = [(place, edge(target)) for place, target in inner]

    def listening(self) -> ExitStack:
        """Return a context in which the hooks are registered."""
        stack = ExitStack()
        for place, target in self._edges:
            stack.callback(target.node.register_prehook(self._taker(place, target.output_nr)).remove)
        return stack

    def replace(self, captured: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return captured gradients, with those of nodes that have run replaced, and forget them."""
        found = [self.found.get(place, gradient) for place, gradient in enumerate(captured)]
        self.found.clear()
        return found

    def _taker(self, place: int, output: int) -> Any:
        def take(gradients: Sequence[Tensor | None]) -> None:
            self.found[place] = gradients[output]

        return take


def one_by_one(start: Start, inputs: Sequence[Root], *, keep: bool, apart: bool = False) -> Iterator[Sequence[Tensor | None]]:
    """Run one backward pass for each task; yield its gradients with respect to ``inputs``, None where it reaches none.

    Args:
        start: Where the passes begin.
        inputs: Tensors of the graph, or edges of it.
        keep: Keep the graph after the last pass.
        apart: The passes have no node in common: each frees its own part of the graph, and ``keep`` is for the rest.
    """
    begins = [start.of_task(k) for k in range(start.num_tasks)]
    last = max((k for k, (outputs, _) in enumerate(begins) if outputs), default=-1)
    arrivals = _Arrivals(inputs)
    with start.entered(), arrivals.listening():
        for k in range(len(begins)):
            outputs, gradients = begins[k]
            begins[k] = ([], [])  # gradients of features are large
            if inputs and outputs:
                retain = not apart and (keep or k != last)
                yield arrivals.replace(_grad(outputs, inputs, gradients, keep=retain))
            else:
                yield [None] * len(inputs)


def all_at_once(start: Start, inputs: Sequence[Root], *, keep: bool) -> list[Sequence[Tensor | None]]:
    """Run one batched pass for all tasks, which holds K gradients of everything on its way; as `one_by_one`.

    Raises:
        RuntimeError: If an operation cannot be batched.
    """
    outputs, seeds = start.side_by_side()
    if not inputs or not outputs:
        return [[None] * len(inputs) for _ in range(start.num_tasks)]
    arrivals = _Arrivals(inputs)

    def run(gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(arrivals.replace(_grad(outputs, inputs, gradients, keep=keep)))

    with start.entered(), arrivals.listening():
        # As torch.autograd.grad(is_grads_batched=True), but with what arrives at nodes inside of the batched pass
        stacks = _vmap(run, 0, 0, allow_none_pass_through=True)(seeds)
    return [[None if stack is None else stack[k] for stack in stacks] for k in range(start.num_tasks)]


def weighted_sum(
    start: Start, weights: Sequence[float], inputs: Sequence[Tensor], *, keep: bool = False
) -> list[Tensor | None]:
    """Run one backward pass of the weighted sum of all tasks; return its gradients with respect to leaf tensors."""
    outputs, gradients = start.together(weights)
    if isinstance(start, AtFeatures) and not keep:
        start.rows.pieces.clear()  # not needed any more, and as large as the features, K times
    if not outputs or not inputs:
        return [None] * len(inputs)
    with start.entered():
        return list(_grad(outputs, inputs, gradients, keep=keep))


def _grad(
    outputs: Sequence[Root], inputs: Sequence[Root], gradients: Sequence[Tensor], *, keep: bool
) -> Sequence[Tensor | None]:
    found: Sequence[Tensor | None] = torch.autograd.grad(
        outputs,  # type: ignore[arg-type]
        inputs,  # type: ignore[arg-type]
        gradients,
        retain_graph=keep,
        allow_unused=True,
    )
    return found
