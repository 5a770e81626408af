"""Backward passes: their outputs and cotangents, one pass for each task or all in one batch, and the gradients that arrive."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from .accumulate import without_hooks
from .gramian import TaskRows, from_vector
from .graph import Reachability, edge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .graph import Root, Trace

_MANY = 1000  # tasks times heads, from which on each pass asks only for the heads of its task


class Cotangents(NamedTuple):
    """The beginning of one backward pass.

    Attributes:
        outputs: Tensors or edges at which the pass begins.
        values: For each of them, the gradient with which it begins.
    """

    outputs: list[Root]
    values: list[Tensor]


@dataclass
class LossOutputs:
    """The losses as outputs at which backward passes begin.

    Attributes:
        roots: By task, its loss in the graph; None for a loss without a graph.
        unit: Gradient with which every pass begins: 1, or the scale of mixed precision. Shape ()
        shares: Factors on the gradients of the tasks, this rank's shares of the samples; None: 1 for each task. Length K.
    """

    roots: Sequence[Root | None]
    unit: Tensor
    shares: Sequence[float] | None = None

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.roots)

    @property
    def device(self) -> torch.device:
        """Device of the losses."""
        return self.unit.device

    def pass_context(self) -> AbstractContextManager[None]:
        """Return the context in which passes from these outputs run."""
        return nullcontext()

    def task_cotangents(self, k: int) -> Cotangents:
        """Return the beginning of the pass of task k."""
        root = self.roots[k]
        # A Function may change its gradient in place, so every pass gets a copy
        return Cotangents([], []) if root is None else Cotangents([root], [self._beginning(k).clone()])

    def weighted_cotangents(self, weights: Sequence[float]) -> Cotangents:
        """Return the beginning of one pass of the weighted sum of all tasks. ``weights``: length K."""
        beginnings = enumerate(zip(self.roots, weights, strict=True))
        pairs = [(root, self._beginning(k) * weight) for k, (root, weight) in beginnings if root is not None]
        return Cotangents([root for root, _ in pairs], [value for _, value in pairs])

    def batched_cotangents(self) -> Cotangents:
        """Return the beginning of one batched pass of all tasks; values of shape (K,)."""
        unit = torch.stack([self._beginning(k) for k in range(self.num_tasks)])
        columns = (unit * torch.eye(self.num_tasks, dtype=unit.dtype, device=unit.device)).unbind()
        pairs = [(root, column) for root, column in zip(self.roots, columns, strict=True) if root is not None]
        return Cotangents([root for root, _ in pairs], [column for _, column in pairs])

    def _beginning(self, k: int) -> Tensor:
        return self.unit if self.shares is None else self.unit * self.shares[k]


@dataclass
class SampleOutputs(LossOutputs):
    """One loss per sample, in a vector, as outputs at which backward passes begin.

    Attributes:
        vector: The losses of all samples, with their graph. Shape (B,).
        indices: Indices of the samples that are present; None: all. Shape (K,).
    """

    vector: Tensor = field(default_factory=lambda: torch.empty(0))
    indices: Tensor | None = None

    def spread(self, values: Tensor) -> Tensor:
        """Return numbers by present sample as numbers by sample, zero for absent ones. Shape (K,) -> (B,)."""
        if self.indices is None:
            return values
        return values.new_zeros(len(self.vector)).index_copy_(0, self.indices.to(values.device), values)

    def task_cotangents(self, k: int) -> Cotangents:
        """Return the beginning of the pass of sample k."""
        value = torch.zeros_like(self.vector)
        value[k if self.indices is None else self.indices[k]] = self.unit
        return Cotangents([self.vector], [value])

    def weighted_cotangents(self, weights: Sequence[float]) -> Cotangents:
        """Return the beginning of one pass of the weighted sum of all samples. ``weights``: length K."""
        values = torch.tensor(weights, dtype=self.unit.dtype, device=self.unit.device) * self.unit
        return Cotangents([self.vector], [self.spread(values).to(self.vector)])

    def batched_cotangents(self) -> Cotangents:
        """Return the beginning of one batched pass of all samples; values of shape (K, B)."""
        values = torch.eye(len(self.vector), dtype=self.vector.dtype, device=self.vector.device) * self.unit
        return Cotangents([self.vector], [values if self.indices is None else values[self.indices.to(values.device)]])


@dataclass
class FeatureOutputs:
    """Features as outputs at which backward passes begin, given their gradients; the interface of `LossOutputs`.

    The hooks of the features have acted on these gradients already, so they are off during the passes.

    Attributes:
        features: Tensors of the graph.
        rows: Their gradients.
    """

    features: Sequence[Tensor]
    rows: TaskRows

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.rows.num_tasks

    @property
    def device(self) -> torch.device:
        """Device of the first features."""
        return self.features[0].device

    def pass_context(self) -> AbstractContextManager[None]:
        """Return the context in which passes from these outputs run."""
        return without_hooks(self.features)

    def task_cotangents(self, k: int) -> Cotangents:
        """Return the beginning of the pass of task k: the features that it reaches, and copies of their gradients."""
        pairs = [(z, by_task[k]) for z, by_task in zip(self.features, self.rows.by_tensor, strict=True)]
        # A Function may change its gradient in place, so every pass gets a copy
        values = [from_vector(row.clone(), z) for z, row in pairs if row is not None]
        return Cotangents([z for z, row in pairs if row is not None], values)

    def weighted_cotangents(self, weights: Sequence[float]) -> Cotangents:
        """Return the beginning of one pass of the weighted sum of all tasks. ``weights``: length K."""
        sums = zip(self.features, self.rows.weighted_sums(weights), strict=True)
        pairs = [(z, total) for z, total in sums if total is not None]
        return Cotangents([z for z, _ in pairs], [from_vector(total, z).to(z) for z, total in pairs])

    def batched_cotangents(self) -> Cotangents:
        """Return the beginning of one batched pass of all tasks.

        Returns:
            Features, and their gradients by task, zero where a task does not reach them. Shape (K, ...) each.
        """
        outputs: list[Root] = []
        values = []
        for z, by_task in zip(self.features, self.rows.by_tensor, strict=True):
            if any(row is not None for row in by_task):
                zeros = torch.zeros_like(z)
                outputs.append(z)
                values.append(torch.stack([zeros if row is None else from_vector(row, z) for row in by_task]))
        return Cotangents(outputs, values)


Outputs = LossOutputs | FeatureOutputs


class _NodeInputs:
    """Gradients as they enter the nodes of some edges, after all hooks.

    If the engine also runs a node, it captures there the gradient before the hooks. Our hook on the node runs last and receives
    the gradient that the node gets. If the node does not run, the captured gradient has passed the hooks.

    Args:
        targets: Tensors or edges to differentiate with respect to.
    """

    def __init__(self, targets: Sequence[Root]) -> None:
        inner = [(place, target) for place, target in enumerate(targets) if not (isinstance(target, Tensor) and target.is_leaf)]
        self._edges = [(place, edge(target)) for place, target in inner]
        self._gradients: dict[int, Tensor | None] = {}  # by place among the targets

    def recording(self) -> AbstractContextManager[Any]:
        """Return a context in which the hooks are registered."""
        if not self._edges:
            return nullcontext()
        stack = ExitStack()
        for place, target in self._edges:
            stack.callback(target.node.register_prehook(self._recorder(place, target.output_nr)).remove)
        return stack

    def corrected(self, captured: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return captured gradients, corrected for the nodes that have run, and forget the recorded gradients."""
        if not self._gradients:
            return captured
        gradients = list(captured)
        for place, gradient in self._gradients.items():
            gradients[place] = gradient
        self._gradients.clear()
        return gradients

    def _recorder(self, place: int, output: int) -> Any:
        def record(gradients: Sequence[Tensor | None]) -> None:
            self._gradients[place] = gradients[output]

        return record


def places_by_task(outputs: Outputs, graph: Trace, heads: Sequence[Tensor], targets: Sequence[Root]) -> list[list[int]] | None:
    """Return the targets that the pass of each task must ask for: all targets but the heads that it cannot reach.

    Args:
        outputs: The outputs at which the passes begin.
        graph: The graph that contains the heads.
        heads: Task-specific parameters.
        targets: Tensors or edges to differentiate with respect to.

    Returns:
        By task, places among the targets; None for all targets. With few heads a search costs more than it saves.
    """
    if not isinstance(outputs, LossOutputs) or isinstance(outputs, SampleOutputs) or outputs.num_tasks * len(heads) < _MANY:
        return None
    paths, of_heads = Reachability(graph, outputs.roots), set(map(id, heads))
    common = [place for place, target in enumerate(targets) if id(target) not in of_heads]
    by_task = [list(common) for _ in range(outputs.num_tasks)]
    for place, target in enumerate(targets):
        for k in paths.indices_reaching(target) if id(target) in of_heads else ():
            by_task[k].append(place)
    return by_task


def sequential_passes(
    outputs: Outputs,
    targets: Sequence[Root],
    places: Sequence[Sequence[int]] | None = None,
    *,
    retain_graph: bool,
    disjoint: bool = False,
) -> Iterator[Sequence[Tensor | None]]:
    """Run one backward pass for each task, one after the other.

    Args:
        outputs: The outputs at which the passes begin.
        targets: Tensors or edges to differentiate with respect to.
        places: By task, the targets that its pass asks for, as `places_by_task` returns them.
        retain_graph: Retain the graph after the last pass.
        disjoint: The passes have no node in common. Each frees its part of the graph; ``retain_graph`` concerns the rest.

    Yields:
        The task's gradients with respect to ``targets``, None where the task does not reach a target.
    """
    beginnings = [outputs.task_cotangents(k) for k in range(outputs.num_tasks)]
    last = max((k for k, beginning in enumerate(beginnings) if beginning.outputs), default=-1)
    node_inputs = _NodeInputs(targets)
    with outputs.pass_context(), node_inputs.recording():
        for k in range(len(beginnings)):
            beginning = beginnings[k]
            beginnings[k] = Cotangents([], [])  # gradients of features are large
            asked = targets if places is None else [targets[place] for place in places[k]]
            if not asked or not beginning.outputs:
                yield [None] * len(targets)
                continue
            retain = not disjoint and (retain_graph or k != last)
            gradients = run_backward(beginning, asked, retain_graph=retain)
            yield node_inputs.corrected(gradients if places is None else _spread(gradients, places[k], len(targets)))


def _spread(gradients: Sequence[Tensor | None], places: Sequence[int], length: int) -> list[Tensor | None]:
    """Return gradients at their places in a list of None."""
    row: list[Tensor | None] = [None] * length
    for place, gradient in zip(places, gradients, strict=True):
        row[place] = gradient
    return row


def batched_passes(outputs: Outputs, targets: Sequence[Root], *, retain_graph: bool) -> list[Tensor | None]:
    """Run one batched pass for all tasks, which keeps K gradients of every tensor on its way.

    Args:
        outputs: The outputs at which the pass begins.
        targets: Tensors or edges to differentiate with respect to.
        retain_graph: Retain the graph after the pass.

    Returns:
        For each target the gradients of all tasks, of shape (K, ...), None where no task reaches it.

    Raises:
        RuntimeError: If an operation cannot be batched.
    """
    beginning = outputs.batched_cotangents()
    if not targets or not beginning.outputs:
        return [None] * len(targets)
    node_inputs = _NodeInputs(targets)
    reached: list[int] = []  # targets

    def run(values: list[Tensor]) -> list[Tensor]:
        gradients = run_backward(Cotangents(beginning.outputs, values), targets, retain_graph=retain_graph)
        pairs = [(i, gradient) for i, gradient in enumerate(node_inputs.corrected(gradients)) if gradient is not None]
        reached.extend(i for i, _ in pairs)
        return [gradient for _, gradient in pairs]

    with outputs.pass_context(), node_inputs.recording():
        # torch.autograd.grad(is_grads_batched=True) lacks the rules of torch.vmap for many operations, and runs them K times
        stacks = torch.vmap(run)(beginning.values)
    by_target: list[Tensor | None] = [None for _ in targets]
    for i, stack in zip(reached, stacks, strict=True):
        by_target[i] = stack
    return by_target


def weighted_pass(
    outputs: Outputs, weights: Sequence[float], leaves: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor | None]:
    """Run one backward pass of the weighted sum of all tasks.

    Args:
        outputs: The outputs at which the pass begins. Unless the graph is retained, gradients of features are dropped.
        weights: One for each task. Length K.
        leaves: Leaf tensors, or features, to differentiate with respect to.
        retain_graph: Retain the graph after the pass.

    Returns:
        The gradients with respect to ``leaves``, None where no task reaches a leaf.
    """
    beginning = outputs.weighted_cotangents(weights)
    if isinstance(outputs, FeatureOutputs) and not retain_graph:
        outputs.rows.by_tensor.clear()  # as large as the features, K times
    if not beginning.outputs or not leaves:
        return [None] * len(leaves)
    with outputs.pass_context():
        return list(run_backward(beginning, leaves, retain_graph=retain_graph))


def run_backward(beginning: Cotangents, targets: Sequence[Root], *, retain_graph: bool) -> Sequence[Tensor | None]:
    """Run one backward pass.

    Args:
        beginning: The outputs at which it begins.
        targets: Tensors or edges to differentiate with respect to.
        retain_graph: Retain the graph after the pass.

    Returns:
        The gradients with respect to ``targets``, None where the pass does not reach one.
    """
    # torch.autograd.grad would check every target in every pass, which costs as much as the pass of a tiny network
    gradients: Sequence[Tensor | None] = _engine_run_backward(
        tuple(beginning.outputs),
        tuple(beginning.values),
        retain_graph,
        False,  # noqa: FBT003 - no graph of the gradients
        tuple(targets),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return gradients
