"""Weighted sums of the gradients of one step, and their accumulation in ``.grad``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ..engine.accumulate import (
    accumulate,
    accumulate_reduced,
    leaf_gradients,
    merged_pairs,
    without_hooks,
)
from ..engine.custom_functions import needs_ordinary_pass
from ..engine.fully_sharded import FullyShardedGradients
from ..engine.gramian import TaskRows
from ..engine.over_ranks import sum_gradients
from ..engine.passes import FeatureOutputs, LossOutputs, weighted_pass
from .loss_weighting import WeightedStep
from .ordinary_backward import require_finite, run_ordinary_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..engine.accumulate import LeafGradient
    from ..engine.engine import Engine
    from ..engine.metric import OptimizerMetric
    from ..engine.partition import Partition
    from ..engine.task_gradients import TaskGradients
    from ..rules.protocol import GradientBalancer, JacobianBalancer, LossBalancer
    from ..types import Direction, Gramian, Heads, Scale, Source, Weights
    from .arguments import StepLosses, ZeroPolicy
    from .plain_step import Seed
    from .reminders import Reminders


class Stage(Protocol):
    """Rules and options of a balancer that a step uses; see `balance.Balancer`.

    Attributes:
        loss_balancer: Rule of the losses.
        heads: Treatment of task-specific parameters.
        scale: Length of the direction.
        zero: Meaning of a zero loss or gradient.
        source: Tensors on which conflict is measured.
        engine: Computation of the task gradients.
        stretch: Factor of ``scale`` on the last direction, for steps that reuse its weights. Shape ()
        reminders: Warnings that are given once.
        ranks: The processes that train together.
        metric: Metric of the inner products of gradients; None: the usual one.
    """

    loss_balancer: LossBalancer
    scale: Scale
    zero: ZeroPolicy
    source: Source
    engine: Engine
    stretch: Tensor
    reminders: Reminders
    ranks: Ranks

    @property
    def metric(self) -> OptimizerMetric | None: ...  # noqa: D102 - see the class
    @property
    def heads(self) -> Heads: ...  # noqa: D102 - see the class


class Measurement(NamedTuple):
    """Inner products and lengths of the gradients of the raw losses, on the host."""

    gramian: Gramian  # without the factor of mixed precision. Shape (K, K)
    shared_lengths: list[float]  # with that factor. Length K
    head_lengths: list[float]  # with that factor. Length K


@dataclass
class StepWriter:
    """Writer of the gradients of one step.

    Attributes:
        stage: Rules and options.
        rule: The gradient balancer.
        step: The losses.
        parts: Leaf tensors of the graph.
        seed: Gradient with which every backward pass begins.
        factor: Factor on all gradients that are added to ``.grad``.
        extra: Gradients of an extra loss, which are added to the direction, with all factors.
        collected: The tasks' gradients, if they have been computed before; None: they are computed in this step.
        is_trial: Whether the step only computes weights; it then leaves ``.grad`` and the graph as they are.
        is_sharded: Whether FSDP2 shards the parameters.
        cross: Inner products of the tasks' gradients on two further batches. Shape (K, K).
    """

    stage: Stage
    rule: GradientBalancer | JacobianBalancer
    step: StepLosses
    parts: Partition
    seed: Seed
    factor: float
    extra: list[LeafGradient]
    collected: TaskGradients | None
    is_trial: bool
    is_sharded: bool
    cross: Gramian | None = None

    @property
    def _outputs(self) -> LossOutputs:
        return self.step.outputs(self.seed.gradient)

    def _gradients(self) -> TaskGradients:
        """Return the gradients of the raw losses, of the batches of all ranks."""
        if self.collected is not None:
            return self.collected
        if self.is_sharded:
            num_ranks = self.stage.ranks.size
            return FullyShardedGradients.measure(
                self._outputs, self.parts, num_ranks, retain_graph=self.is_trial, roots=self._roots()
            )
        ranks = self.stage.ranks if self.stage.ranks.size > 1 else None
        as_matrix = self.rule.sees == "jacobian"
        return self.stage.engine.measure(
            self._outputs, self.parts, as_matrix=as_matrix, retain_graph=self.is_trial, ranks=ranks, roots=self._roots()
        )

    def _roots(self) -> list[Tensor] | None:
        """Return the factors of the metric on the coordinates of each shared parameter; None: 1."""
        return None if self.stage.metric is None else self.stage.metric.roots(self.parts.inputs)

    def _head_weights(self, weighted: WeightedStep, weights: Weights) -> Weights:
        """Return the weights of the raw gradients of the heads. Shape (K,)."""
        if self.stage.heads == "weighted":
            return self.factor * weighted.weighting.pull_back(weights)
        return self.factor * weighted.loss_weights

    def _accumulate_weighted(
        self, gradients: TaskGradients, weighted: WeightedStep, weights: Weights, total: Weights, measured: Measurement
    ) -> None:
        """Accumulate the weighted sums of the tasks' gradients."""
        if self.is_trial:
            return
        shared_weights, head_weights = (self.factor * total).tolist(), self._head_weights(weighted, weights).tolist()
        others = [
            *gradients.head_sums(head_weights),
            *weighted.parameter_pairs(self.factor * self.seed.scale),
        ]
        bound = None
        if not gradients.needs_pass and self.stage.metric is None:  # lengths in another metric bound nothing
            bound = bound_of_sums((shared_weights, head_weights), (measured.shared_lengths, measured.head_lengths))
        self._write(gradients, shared_weights, others, bound)

    def _accumulate_direction(self, gradients: TaskGradients, weighted: WeightedStep, direction: Direction) -> None:
        """Accumulate a direction, of the parameters or of the features, and the gradients of the heads."""
        if self.is_trial:
            return
        head_weights = self.factor * weighted.loss_weights
        others = [
            *gradients.head_sums(head_weights.tolist()),
            *weighted.parameter_pairs(self.factor * self.seed.scale),
        ]
        pieces = gradients.split(direction)
        if self.parts.source == "features":
            gradients.replace_by_direction(pieces)
            self._write(gradients, [1.0], others, None)
            return
        pairs = [*leaf_gradients(self.parts.inputs, pieces), *others]
        require_finite(pairs, self.step.tasks)
        self._add_to_grad(pairs)

    def _accumulate_reused(self, weighted: WeightedStep, weights: Weights, total: Weights) -> None:
        """Accumulate the weighted sums of the tasks' gradients, by passes of all tasks at once."""
        shared, heads = (self.factor * total).tolist(), self._head_weights(weighted, weights).tolist()
        own = weighted.parameter_pairs(self.factor * self.seed.scale)
        if self.collected is not None or self.is_sharded:
            gradients = self._gradients()
            pairs = [*gradients.weighted_sums(shared), *gradients.head_sums(heads)]
        elif self.parts.source == "features" and self.parts.features and needs_ordinary_pass(self.parts.lower_graph.functions):
            self._run_through_features(self._outputs, shared, heads, own)
            return
        else:
            pairs = self._weighted_pairs(self._outputs, shared, heads)
        require_finite(pairs, self.step.tasks)
        self._add_to_grad([*pairs, *own])

    def _weighted_pairs(
        self, outputs: LossOutputs, shared_weights: list[float], head_weights: list[float]
    ) -> list[LeafGradient]:
        """Return the weighted gradients of heads and trunk, by one backward pass if their weights are equal."""
        leaves = [*self.parts.heads, *self.parts.trunk]
        with without_hooks(leaves):
            if head_weights == shared_weights:
                gradients = weighted_pass(outputs, shared_weights, leaves)
            else:
                gradients = weighted_pass(outputs, head_weights, self.parts.heads, retain_graph=True)
                gradients += weighted_pass(outputs, shared_weights, self.parts.trunk)
        if self.stage.ranks.size > 1:
            gradients = sum_gradients(self.stage.ranks, leaves, gradients)
        return leaf_gradients(leaves, gradients)

    def _run_through_features(
        self, outputs: LossOutputs, shared_weights: list[float], head_weights: list[float], own: list[LeafGradient]
    ) -> None:
        """Run passes to the heads and to the features, then one ordinary backward pass below the features."""
        with without_hooks(self.parts.heads):
            heads = leaf_gradients(self.parts.heads, weighted_pass(outputs, head_weights, self.parts.heads, retain_graph=True))
        cotangents = weighted_pass(outputs, shared_weights, self.parts.features)
        rows = TaskRows.of_one_task(cotangents)
        begin = FeatureOutputs(self.parts.features, rows)
        others = merged_pairs(heads, own, self.extra)
        run_ordinary_backward(begin, [1.0], others, self.parts.trunk, self.step.tasks)

    def _write(
        self, gradients: TaskGradients, shared_weights: list[float], others: list[LeafGradient], bound: float | None
    ) -> None:
        """Accumulate a weighted sum of the tasks' gradients, and the gradients of other leaf tensors.

        Args:
            gradients: The tasks' gradients.
            shared_weights: Weight of each task's gradient of the shared parameters.
            others: Gradients of heads, and of the balancer's own parameters.
            bound: Bound on the entries; None if unknown.
        """
        outputs = gradients.outputs
        at_features = isinstance(outputs, FeatureOutputs) and self.parts.source == "features"
        if at_features and needs_ordinary_pass(self.parts.lower_graph.functions):
            others = merged_pairs(others, self.extra)
            run_ordinary_backward(outputs, shared_weights, others, self.parts.trunk, self.step.tasks)
            return
        with without_hooks(self.parts.trunk):
            pairs = [*gradients.weighted_sums(shared_weights), *others]
        if bound is None or any(bound > torch.finfo(dtype).max for dtype in {leaf.dtype for leaf, _ in pairs}):
            require_finite(pairs, self.step.tasks)
        self._add_to_grad(pairs)

    def _add_to_grad(self, pairs: list[LeafGradient]) -> None:
        """Add gradients of the whole batch, and of the extra loss, to ``.grad``."""
        if self.extra:
            pairs = merged_pairs(pairs, self.extra)
        if self.stage.ranks.size > 1 or self.is_sharded:
            accumulate_reduced(pairs)
        else:
            accumulate(pairs)


def bound_of_sums(weights: Sequence[Sequence[float]], lengths: Sequence[Sequence[float]]) -> float:
    """Return a bound on the entries of weighted sums of gradients of the given lengths; infinite if a length is NaN."""
    pairs = zip(weights, lengths, strict=True)
    bounds = [sum(abs(weight) * length for weight, length in zip(*pair, strict=True)) for pair in pairs]
    return math.inf if any(map(math.isnan, bounds)) else max(bounds)
