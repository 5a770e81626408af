"""One step of the stage with a gradient balancer: measure, weigh, solve, accumulate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from balance.engine.accumulate import (
    accumulate,
    accumulate_reduced,
    are_finite,
    leaf_gradients,
    merged_pairs,
    without_hooks,
)
from balance.engine.custom_functions import needs_ordinary_pass
from balance.engine.fully_sharded import FullyShardedGradients
from balance.engine.gramian import TaskRows, multiply_rows
from balance.engine.graph import Reachability
from balance.engine.over_ranks import sum_gradients
from balance.engine.passes import FeatureOutputs, LossOutputs, weighted_pass
from balance.stage.length import stretch_of_direction, stretch_of_trunk, stretch_of_weights, stretch_to_sum
from balance.stage.loss_weighting import WeightedStep, Weighting, weighted_step
from balance.stage.ordinary_backward import NotFiniteError, require_finite, run_ordinary_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from balance.distributed.ranks import Ranks
    from balance.engine.accumulate import LeafGradient
    from balance.engine.engine import Engine
    from balance.engine.partition import Partition
    from balance.engine.task_gradients import TaskGradients
    from balance.rules.protocol import GradientBalancer, JacobianBalancer, LossBalancer
    from balance.stage.arguments import StepLosses, ZeroPolicy
    from balance.stage.plain_step import Seed
    from balance.stage.reminders import Reminders
    from balance.stage.report import Report
    from balance.types import Direction, Gramian, Heads, Scale, Source, Weights


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
    """

    loss_balancer: LossBalancer
    heads: Heads
    scale: Scale
    zero: ZeroPolicy
    source: Source
    engine: Engine
    stretch: Tensor
    reminders: Reminders
    ranks: Ranks


class _Measurement(NamedTuple):
    """Inner products and lengths of the gradients of the raw losses, on the host."""

    gramian: Gramian  # without the factor of mixed precision. Shape (K, K)
    shared_lengths: Tensor  # with that factor. Shape (K,)
    head_lengths: Tensor  # with that factor. Shape (K,)


@dataclass
class BalancedStep:
    """One step with a gradient balancer.

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
    """

    stage: Stage
    rule: GradientBalancer | JacobianBalancer
    step: StepLosses
    parts: Partition
    seed: Seed
    factor: float
    extra: list[LeafGradient] = field(default_factory=list)
    collected: TaskGradients | None = None
    is_trial: bool = False
    is_sharded: bool = False

    def run(self) -> Report:
        """Take the step.

        Returns:
            The record of the step.

        Raises:
            NotFiniteError: If a gradient is not finite; ``.grad`` is then as before.
            ValueError: If a rule fails, or the losses do not reach what they should.
            RuntimeError: If the graph cannot be walked once for each task.
        """
        weighted = self._weighted()
        if (reused := self._reused_weights(weighted)) is not None:
            return self._reuse(weighted, *reused)
        gradients = self._gradients()
        measured = self._measurement(gradients)
        balanced = self._balanced(gradients, weighted, measured.gramian)
        self._remind(gradients)
        gramian = weighted.weighting.gramian(measured.gramian)
        if gradients.jacobian is None or not self.parts.inputs:
            weights = self._weights(gradients, weighted, balanced, gramian)
            total = self._total_weights(weighted, balanced, weights)
            self._accumulate_weighted(gradients, weighted, weights, total, measured)
            return weighted.report(self.step, weights, gramian, self._unshared(balanced), total)
        direction = self._direction(gradients, weighted, balanced, gramian)
        self._accumulate_direction(gradients, weighted, direction)
        return weighted.report(self.step, None, gramian, self._unshared(balanced))

    @property
    def _outputs(self) -> LossOutputs:
        return self.step.outputs(self.seed.gradient)

    def _gradients(self) -> TaskGradients:
        """Return the gradients of the raw losses, of the batches of all ranks."""
        if self.collected is not None:
            return self.collected
        if self.is_sharded:
            num_ranks = self.stage.ranks.size
            return FullyShardedGradients.measure(self._outputs, self.parts, num_ranks, retain_graph=self.is_trial)
        ranks = self.stage.ranks if self.stage.ranks.size > 1 else None
        as_matrix = self.rule.sees == "jacobian"
        return self.stage.engine.measure(
            self._outputs, self.parts, as_matrix=as_matrix, retain_graph=self.is_trial, ranks=ranks
        )

    def _weighted(self) -> WeightedStep:
        """Return the weighted losses, whose gradients of the loss balancer's own parameters are finite."""
        weighted = weighted_step(self.stage.loss_balancer, self.step)
        if not are_finite([gradient for _, gradient in weighted.parameter_pairs()]):
            raise NotFiniteError("Gradients of the loss balancer's parameters must be finite, but got infinite or NaN entries.")
        return weighted

    def _measurement(self, gradients: TaskGradients) -> _Measurement:
        """Return inner products and lengths of finite gradients, after one copy to the host."""
        if self.parts.inputs and not any(gradients.is_reached):
            raise ValueError(_unreached(self.stage.source, len(self.parts.inputs)))
        numbers = torch.cat([gradients.gramian, gradients.head_lengths()[None]]).cpu()
        gradients.gramian, head_lengths = numbers[:-1], numbers[-1]
        squares = gradients.gramian.diagonal()
        finite, heads_finite = squares.isfinite().tolist(), head_lengths.isfinite().tolist()
        bad = [
            task
            for k, task in enumerate(self.step.tasks)
            if not finite[k] or not (heads_finite[k] or gradients.heads_are_finite(k))
        ]
        if bad:
            raise NotFiniteError(
                f"Gradients must be finite, but the gradients of {', '.join(bad)} are not. Look at the learning rate."
            )
        return _Measurement(gradients.gramian / self.seed.scale**2, squares.clamp(min=0).sqrt(), head_lengths)

    def _balanced(self, gradients: TaskGradients, weighted: WeightedStep, gramian: Gramian) -> Tensor:
        """Return the positions of the tasks that the rule balances, because they reach the shared parameters. Shape (k,)."""
        if not self.parts.inputs:
            return torch.arange(len(gramian), device="cpu")
        reaching = gradients.reaching_tasks
        if self.stage.zero == "absent":
            reaching = [reaches and float(square) > 0 for reaches, square in zip(reaching, gramian.diagonal(), strict=True)]
        return _depending(weighted, reaching)

    def _unshared(self, balanced: Tensor) -> tuple[str, ...]:
        positions = set(balanced.tolist())
        return tuple(task for k, task in enumerate(self.step.tasks) if k not in positions)

    def _remind(self, gradients: TaskGradients) -> None:
        if self.stage.source == "parameters":
            self.stage.reminders.check_shared(self.step.tasks, self.parts.inputs, gradients.reached_by)

    def _weights(self, gradients: TaskGradients, weighted: WeightedStep, balanced: Tensor, gramian: Gramian) -> Weights:
        """Return the weights of the gradients of all weighted losses; 1 for a task that takes no part. Shape (K,)."""
        weights = torch.ones_like(gramian[0])
        if self.parts.inputs and len(balanced):
            G = gramian[balanced][:, balanced]
            weights[balanced] = self._solve(gradients, weighted.weighting.rows(balanced), balanced, G)
        return weights

    def _solve(self, gradients: TaskGradients, weighting: Weighting, balanced: Tensor, G: Gramian) -> Weights:
        """Apply the rule and the option ``scale`` to the balanced tasks. Shape (k,)."""
        weights = self.rule(G, self.step.context_of(balanced)).to(G)
        if self.stage.scale == "sum":
            return weights * stretch_to_sum(weights)
        stretch = stretch_of_weights(self.stage.scale, G, weights)
        fixed = self.stage.scale == "paper" and self.rule.fixed_length
        is_partial = self.parts.source == "parameters" and len(self.parts.inputs) < len(self.parts.trunk)
        if is_partial and (fixed or self.stage.scale == "norm"):
            stretch = stretch_of_trunk(gradients, weighting, weights, G, self.seed.scale, stretch, fixed=fixed)
        self.stage.stretch.fill_(stretch)
        return weights * stretch

    def _direction(self, gradients: TaskGradients, weighted: WeightedStep, balanced: Tensor, gramian: Gramian) -> Direction:
        """Return the direction of a rule that sees the Jacobian of the weighted losses, with all factors. Shape (P,)."""
        assert gradients.jacobian is not None
        multiply_rows(gradients.jacobian, weighted.weighting.matrix / self.seed.scale)
        J = gradients.jacobian
        if len(balanced) < len(gramian):
            J = J[balanced.to(J.device)]
        direction = self.rule(J, self.step.context_of(balanced))
        square = float(torch.linalg.vector_norm(direction, dtype=torch.float64)) ** 2
        stretch = stretch_of_direction(self.stage.scale, gramian[balanced][:, balanced], square)
        return self.seed.scale * self.factor * (direction * stretch)

    def _head_weights(self, weighted: WeightedStep, weights: Weights) -> Weights:
        """Return the weights of the raw gradients of the heads. Shape (K,)."""
        if self.stage.heads == "weighted":
            return self.factor * weighted.weighting.pull_back(weights)
        return self.factor * weighted.loss_weights

    def _total_weights(self, weighted: WeightedStep, balanced: Tensor, weights: Weights) -> Weights:
        """Return the weights of the raw gradients in the direction of the shared parameters. Shape (K,), float64."""
        if not self.parts.inputs:
            return weights
        return weighted.weighting.rows(balanced).pull_back(weights[balanced])

    def _accumulate_weighted(
        self, gradients: TaskGradients, weighted: WeightedStep, weights: Weights, total: Weights, measured: _Measurement
    ) -> None:
        """Accumulate the weighted sums of the tasks' gradients."""
        if self.is_trial:
            return
        shared_weights, head_weights = self.factor * total, self._head_weights(weighted, weights)
        others = [
            *gradients.head_sums(head_weights.tolist()),
            *weighted.parameter_pairs(self.factor * self.seed.scale),
        ]
        bound = None
        if not gradients.needs_pass:
            bound = _bound((shared_weights, head_weights), (measured.shared_lengths, measured.head_lengths))
        self._write(gradients, shared_weights.tolist(), others, bound)

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

    def _reused_weights(self, weighted: WeightedStep) -> tuple[Tensor, Weights] | None:
        """Return balanced tasks and weights of an earlier step that the rule uses again; None if it must solve."""
        if self.rule.sees == "jacobian" or not self.rule.reuses or not self.parts.inputs:
            return None
        reaching = self._reaching_tasks()
        balanced = _depending(weighted, reaching)
        weights = self.rule.reuse(self.step.context_of(balanced)) if len(balanced) else None
        return None if weights is None else (balanced, weights)

    def _reaching_tasks(self) -> list[bool]:
        """Return for each task whether it reaches what the tasks share, by the graph or by collected gradients."""
        if self.collected is not None:
            return self.collected.reaching_tasks
        if self.is_sharded:
            return [True] * len(self.step.tasks)
        reaching = Reachability(self.parts.upper_graph, self.step.roots).roots_reaching_any(self.parts.inputs)
        if self.stage.ranks.size == 1:
            return reaching
        counts = self.stage.ranks.sum(torch.tensor(reaching, dtype=torch.float64, device="cpu"))
        return (counts > 0).tolist()

    def _reuse(self, weighted: WeightedStep, balanced: Tensor, solved: Weights) -> Report:
        """Take a step with known weights: one backward pass, and one through unweighted heads."""
        weights = torch.ones(len(self.step.tasks), dtype=torch.float64, device="cpu")
        stretch = stretch_to_sum(solved) if self.stage.scale == "sum" else float(self.stage.stretch)
        weights[balanced] = solved.cpu().double() * stretch
        total = self._total_weights(weighted, balanced, weights)
        if not self.is_trial:
            self._accumulate_reused(weighted, weights, total)
        return weighted.report(self.step, weights, None, self._unshared(balanced), total)

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


def _unreached(source: Source, count: int) -> str:
    if source == "parameters":
        return f"A loss must reach a shared parameter, but none reaches any of the {count} tensors in shared."
    return (
        f"A loss must be computed from the features, but none reaches any of the {count} tensors in features. Give the very "
        "tensors that the heads use: DistributedDataParallel returns copies with static_graph or find_unused_parameters."
    )


def _depending(weighted: WeightedStep, reaching: Sequence[bool]) -> Tensor:
    """Return the positions of the tasks whose weighted loss depends on a raw loss that reaches what the tasks share."""
    R = torch.tensor(reaching, dtype=torch.float64, device="cpu")
    return ((weighted.weighting.matrix != 0).double() @ R > 0).nonzero().flatten()


def _bound(weights: Sequence[Tensor], lengths: Sequence[Tensor]) -> float:
    """Return a bound on the entries of weighted sums of gradients of the given lengths; infinite if a length is NaN."""
    bounds = [float(w.abs() @ length.nan_to_num(nan=math.inf)) for w, length in zip(weights, lengths, strict=True)]
    return math.inf if any(map(math.isnan, bounds)) else max(bounds)
