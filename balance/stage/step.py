"""One step of the stage with a gradient balancer: measure, weigh, solve, accumulate."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING

import torch

from ..engine.accumulate import are_finite
from ..engine.gramian import multiply_rows
from ..engine.graph import Reachability
from ..rules.context import all_indices
from .length import stretch_of_direction, stretch_of_trunk, stretch_of_weights, stretch_to_sum
from .loss_weighting import WeightedStep, Weighting, weighted_step
from .ordinary_backward import NotFiniteError
from .writing import Measurement, StepWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..engine.task_gradients import TaskGradients
    from ..types import Direction, Gramian, Source, Weights
    from .report import Report


class BalancedStep(StepWriter):
    """One step with a gradient balancer."""

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
        if self.rule.sees == "gramian" or not self.parts.inputs:
            weights = self._weights(gradients, weighted, balanced, gramian)
            total = self._total_weights(weighted, balanced, weights)
            self._accumulate_weighted(gradients, weighted, weights, total, measured)
            return weighted.report(self.step, weights, gramian, self._unshared(balanced), total)
        direction = self._direction(gradients, weighted, balanced, gramian)
        self._accumulate_direction(gradients, weighted, direction)
        return weighted.report(self.step, None, gramian, self._unshared(balanced))

    def _weighted(self) -> WeightedStep:
        """Return the weighted losses, whose gradients of the loss balancer's own parameters are finite."""
        weighted = weighted_step(self.stage.loss_balancer, self.step)
        if weighted.parameters and not are_finite([gradient for _, gradient in weighted.parameter_pairs()]):
            raise NotFiniteError("Gradients of the loss balancer's parameters must be finite, but got infinite or NaN entries.")
        return weighted

    def _measurement(self, gradients: TaskGradients) -> Measurement:
        """Return inner products and lengths of finite gradients, after one copy to the host."""
        if self.parts.inputs and not any(map(any, gradients.reached_by)):
            raise ValueError(_unreached(self.stage.source, len(self.parts.inputs)))
        numbers = torch.cat([gradients.gramian, gradients.head_lengths()[None]]).cpu()
        gradients.gramian = numbers[:-1]
        squares, head_lengths = gradients.gramian.diagonal().tolist(), numbers[-1].tolist()
        bad = [
            task
            for k, task in enumerate(self.step.tasks)
            if not isfinite(squares[k]) or not (isfinite(head_lengths[k]) or gradients.heads_are_finite(k))
        ]
        if bad:
            raise NotFiniteError(
                f"Gradients must be finite, but the gradients of {', '.join(bad)} are not. Look at the learning rate."
            )
        unscaled = gradients.gramian if self.seed.scale == 1.0 else gradients.gramian / self.seed.scale**2
        return Measurement(unscaled, [sqrt(max(square, 0.0)) for square in squares], head_lengths)

    def _balanced(self, gradients: TaskGradients, weighted: WeightedStep, gramian: Gramian) -> Tensor:
        """Return the positions of the tasks that the rule balances, because they reach the shared parameters. Shape (k,)."""
        if not self.parts.inputs:
            return torch.arange(len(gramian), device="cpu")
        reaching = gradients.reaching_tasks
        if self.stage.zero == "absent":
            reaching = [reaches and float(square) > 0 for reaches, square in zip(reaching, gramian.diagonal(), strict=True)]
        return _depending(weighted, reaching)

    def _unshared(self, balanced: Tensor) -> tuple[str, ...]:
        if len(balanced) == len(self.step.tasks):
            return ()
        positions = set(balanced.tolist())
        return tuple(task for k, task in enumerate(self.step.tasks) if k not in positions)

    def _remind(self, gradients: TaskGradients) -> None:
        if self.stage.source == "parameters":
            self.stage.reminders.check_shared(self.step.tasks, self.parts.inputs, gradients.reached_by)

    def _weights(self, gradients: TaskGradients, weighted: WeightedStep, balanced: Tensor, gramian: Gramian) -> Weights:
        """Return the weights of the gradients of all weighted losses; 1 for a task that takes no part. Shape (K,)."""
        if self.parts.inputs and len(balanced) == len(gramian):
            # A rule may change its Gramian in place, so it gets a copy
            return self._solve(gradients, weighted.weighting, balanced, gramian.clone())
        weights = torch.ones_like(gramian[0])
        if self.parts.inputs and len(balanced):
            G = gramian[balanced][:, balanced]
            weights[balanced] = self._solve(gradients, weighted.weighting.rows(balanced), balanced, G)
        return weights

    def _solve(self, gradients: TaskGradients, weighting: Weighting, balanced: Tensor, G: Gramian) -> Weights:
        """Apply the rule and the option ``scale`` to the balanced tasks. Shape (k,)."""
        context = self.step.context_of(balanced)
        if self.cross is not None:
            context = replace(context, cross=weighting.gramian(self.cross))
        weights = self.rule(G, context).to(G)
        if self.stage.scale == "sum":
            return weights * stretch_to_sum(weights)
        stretch = stretch_of_weights(self.stage.scale, G, weights)
        fixed = self.stage.scale == "paper" and self.rule.fixed_length
        is_partial = self.parts.source == "parameters" and len(self.parts.inputs) < len(self.parts.trunk)
        if is_partial and (fixed or self.stage.scale == "norm"):
            stretch = stretch_of_trunk(gradients, weighting, weights, G, self.seed.scale, stretch, fixed=fixed)
        if self.rule.sees == "gramian" and self.rule.reuses:
            self.stage.stretch.fill_(stretch)
        return weights * stretch  # a new tensor, since a rule may return its state

    def _direction(self, gradients: TaskGradients, weighted: WeightedStep, balanced: Tensor, gramian: Gramian) -> Direction:
        """Return the direction of a rule that sees the Jacobian of the weighted losses, with all factors. Shape (P,)."""
        assert gradients.jacobian is not None
        multiply_rows(gradients.jacobian, weighted.weighting.full_matrix / self.seed.scale)
        J = gradients.jacobian
        if len(balanced) < len(gramian):
            J = J[balanced.to(J.device)]
        direction = self.rule(J, self.step.context_of(balanced))
        square = float(torch.linalg.vector_norm(direction, dtype=torch.float64)) ** 2
        stretch = stretch_of_direction(self.stage.scale, gramian[balanced][:, balanced], square)
        return self.seed.scale * self.factor * (direction * stretch)

    def _total_weights(self, weighted: WeightedStep, balanced: Tensor, weights: Weights) -> Weights:
        """Return the weights of the raw gradients in the direction of the shared parameters. Shape (K,), float64."""
        if not self.parts.inputs:
            return weights
        if len(balanced) == len(weights):
            return weighted.weighting.pull_back(weights)
        return weighted.weighting.rows(balanced).pull_back(weights[balanced])

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


def _unreached(source: Source, count: int) -> str:
    if source == "parameters":
        return f"A loss must reach a shared parameter, but none reaches any of the {count} tensors in shared."
    return (
        f"A loss must be computed from the features, but none reaches any of the {count} tensors in features. Give the very "
        "tensors that the heads use: DistributedDataParallel returns copies with static_graph or find_unused_parameters."
    )


def _depending(weighted: WeightedStep, reaching: Sequence[bool]) -> Tensor:
    """Return the positions of the tasks whose weighted loss depends on a raw loss that reaches what the tasks share."""
    E = weighted.weighting.matrix
    if all(reaching) and (weighted.weighting.is_identity or (E.ndim == 1 and E.all())):
        return all_indices(len(reaching))
    R = torch.tensor(reaching, dtype=torch.float64, device="cpu")
    depends = (E != 0) & (R > 0) if E.ndim == 1 else (E != 0).double() @ R > 0
    return depends.nonzero().flatten()
