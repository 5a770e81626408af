"""Gramian of one loss per sample by one backward pass, where samples are proved to be independent."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge

from .accumulate import leaf_gradients, without_hooks
from .gramian import TaskRows
from .graph import edge, trace
from .independence import independent_samples
from .nodes import has_hooks
from .passes import FeatureOutputs, SampleOutputs, weighted_pass
from .sample_gradients import SampleGramian
from .task_gradients import TaskGradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..types import Gramian
    from .accumulate import LeafGradient
    from .independence import SampleGraph
    from .partition import Partition


@dataclass
class SampleGradients(TaskGradients):
    """Gradients of one loss per sample: their Gramian, and weighted sums by further backward passes.

    Attributes:
        losses: The losses, at which the passes for the heads begin.
    """

    losses: SampleOutputs | None = None

    @property
    def needs_pass(self) -> bool:
        """Return True: no gradients are stored."""
        return True

    def head_lengths(self) -> Tensor:
        """Return zeros: the gradients of the heads are known only after their weighted pass. Shape (K,), float64."""
        return torch.zeros(self.outputs.num_tasks, dtype=torch.float64, device=self.gramian.device)

    def head_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the gradients of each head. ``weights``: length K."""
        heads = self.partition.heads
        assert self.losses is not None
        with without_hooks(heads):
            retain = self.partition.source == "parameters"  # the trunk's pass begins at the losses too
            return leaf_gradients(heads, weighted_pass(self.losses, weights, heads, retain_graph=retain))


class _SampleFeatures(FeatureOutputs):
    """Features as outputs at which one backward pass begins, given the gradients of all samples in one tensor.

    Args:
        features: Tensors of the graph.
        rows: Their gradients, each sample at its own place: one row for all.
        places: For each feature, the distance of its samples in row-major order.
        losses: The losses.
    """

    def __init__(self, features: Sequence[Tensor], rows: TaskRows, places: Sequence[int], losses: SampleOutputs) -> None:
        super().__init__(features, rows)
        self.places, self.losses = places, losses

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.losses.num_tasks

    def weighted_cotangents(self, weights: Sequence[float]) -> Any:
        """Return the beginning of one pass of the weighted sum of all losses. ``weights``: length K."""
        rows, w = self.rows, self.losses.spread(torch.tensor(weights, dtype=torch.float64))
        scaled: list[list[Tensor | None]] = []
        for (row,), inner in zip(rows.by_tensor, self.places, strict=True):
            if row is None:
                scaled.append([None])
                continue
            wide = row.to(torch.promote_types(row.dtype, torch.float32)).view(-1, len(w), inner)
            scaled.append([(wide * w.to(wide)[:, None]).flatten()])
        return FeatureOutputs(self.features, TaskRows(1, scaled)).weighted_cotangents([1.0])


def measure_samples(outputs: SampleOutputs, partition: Partition, *, retain_graph: bool) -> SampleGradients | None:
    """Return the gradients of one loss per sample by one backward pass.

    Args:
        outputs: The losses.
        partition: Leaves of the graph.
        retain_graph: Retain the graph after all passes.

    Returns:
        None if samples are not proved to be independent.
    """
    at_features = partition.source == "features"
    if at_features and (not partition.features or any(map(_is_hooked, partition.inputs))):
        return None
    graph = partition.upper_graph
    if partition.features and not at_features:
        graph = trace([outputs.vector])
    samples = independent_samples(outputs.vector, graph, partition.inputs, at_features=at_features)
    if samples is None:
        return None
    K = outputs.num_tasks
    gradients = SampleGradients(
        outputs, partition, [[i in samples.reached] * K for i in range(len(partition.inputs))], losses=outputs
    )
    if at_features:
        gramian = _measure_features(outputs, samples, gradients, retain_graph=retain_graph or bool(partition.heads))
    else:
        device = partition.inputs[0].device if partition.inputs else outputs.device
        gramian = _measure_parameters(outputs, samples, SampleGramian(len(outputs.vector), device))
    gradients.gramian = gramian if outputs.indices is None else gramian[outputs.indices][:, outputs.indices]
    return gradients


def _is_hooked(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks) or has_hooks(edge(tensor).node)


def _measure_parameters(outputs: SampleOutputs, samples: SampleGraph, gramian: SampleGramian) -> Gramian:
    """Run one backward pass down to the lowest uses of measured parameters. Shape (B, B)."""
    arrivals = _Arrivals(samples, gramian)
    targets = [GradientEdge(node, 0) for node in samples.lowest]
    if not targets:
        return gramian.total()
    beginning = outputs.weighted_cotangents([1.0] * outputs.num_tasks)
    with arrivals.recording():
        gradients = torch.autograd.grad(
            beginning.outputs,  # type: ignore[arg-type]
            targets,
            beginning.values,
            retain_graph=True,
            allow_unused=True,
        )
    for node, gradient in zip(samples.lowest, gradients, strict=True):
        arrivals.add(node, gradient)
    return gramian.total()


class _Arrivals:
    """Gradients that arrive at the uses of parameters; each is dropped as soon as its parameters are measured.

    Args:
        samples: The uses.
        gramian: The inner products to which the parameters are added.
    """

    def __init__(self, samples: SampleGraph, gramian: SampleGramian) -> None:
        self._samples, self._gramian = samples, gramian
        self._missing = {i: {use.node for use in uses} for i, uses in samples.uses.items()}
        self._gradients: dict[int, dict[Any, Tensor | None]] = {i: {} for i in samples.uses}
        self._parameters: dict[Any, list[int]] = {}
        for i, nodes in self._missing.items():
            for node in nodes:
                self._parameters.setdefault(node, []).append(i)

    def recording(self) -> ExitStack:
        """Return a context in which gradients are added as they enter nodes that the pass runs."""
        stack = ExitStack()
        for node in set(self._parameters) - set(self._samples.lowest):
            stack.callback(node.register_prehook(partial(self._record, node)).remove)
        return stack

    def _record(self, node: Any, gradients: Sequence[Tensor | None]) -> None:
        self.add(node, gradients[0])

    def add(self, node: Any, gradient: Tensor | None) -> None:
        """Add the gradient of the output of a node, and measure the parameters of which all gradients have arrived."""
        wide = None if gradient is None else gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        for i in self._parameters[node]:
            self._missing[i].discard(node)
            self._gradients[i][node] = wide
            if not self._missing[i]:
                arrived = self._gradients.pop(i)
                pairs = [(use, arrived[use.node]) for use in self._samples.uses[i]]
                present = [(use, delta) for use, delta in pairs if delta is not None]
                if present:
                    self._gramian.add(present, with_bias=i in self._samples.biased)


def _measure_features(
    outputs: SampleOutputs, samples: SampleGraph, gradients: SampleGradients, *, retain_graph: bool
) -> Gramian:
    """Run one backward pass down to the features, where different samples have no coordinate in common. Shape (B, B)."""
    features = gradients.partition.features
    beginning = outputs.weighted_cotangents([1.0] * outputs.num_tasks)
    with without_hooks(features):
        rows = torch.autograd.grad(
            beginning.outputs,  # type: ignore[arg-type]
            features,
            beginning.values,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    B = len(outputs.vector)
    squares = torch.zeros(B, dtype=torch.float64, device=features[0].device)
    for i, row in enumerate(rows):
        if row is not None:
            squares += row.reshape(-1, B, samples.places[i]).double().square().sum(dim=(0, 2)).to(squares)
    places = [samples.places.get(i, 1) for i in range(len(features))]
    gradients.outputs = _SampleFeatures(features, TaskRows.of_one_task(rows), places, outputs)
    return squares.diag()
