"""One step of the stage with a gradient balancer: weigh, measure, solve, accumulate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from balance.engine.accumulate import accumulate, added, are_finite, as_leaf, delivery, paired, without_hooks
from balance.engine.custom_functions import walks_once
from balance.engine.gramian import Rows, change_rows, flat
from balance.engine.graph import Reach
from balance.engine.passes import AtFeatures, AtLosses, weighted_sum
from balance.rules.build import apply_rule
from balance.rules.registry import checked_weights, takes
from balance.stage.loss_weighting import Weighing, weighing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from balance.engine.accumulate import LeafGradient
    from balance.engine.engine import TaskGradients
    from balance.engine.partition import Parts
    from balance.engine.passes import Start
    from balance.stage.arguments import Step
    from balance.stage.balancer import Balancer
    from balance.stage.report import Report
    from balance.types import Direction, Gramian, Jacobian, Source, Weights

_ROUNDING = 1e-13  # of the squared length of a direction, relative to the largest that its terms could add up to


class NotFiniteError(ValueError):
    """A gradient has an infinite or NaN entry; ``.grad`` is as before."""


@dataclass
class BalancedStep:
    """One step with a gradient balancer.

    Attributes:
        stage: The balancer, for its rules and options.
        step: The losses.
        parts: The leaves of the graph.
        one: Gradient with which every backward pass begins: 1, or the scale of mixed precision. Shape ()
        scale: The same as a number.
        factor: Factor on what is added to ``.grad``.
    """

    stage: Balancer
    step: Step
    parts: Parts
    one: Tensor
    scale: float
    factor: float

    def run(self) -> Report:
        """Take the step.

        Raises:
            NotFiniteError: If a gradient is not finite; ``.grad`` is then as before.
            ValueError: If a rule fails, or the losses do not reach what they should.
            RuntimeError: If the graph cannot be walked once for each task.
        """
        start = AtLosses(self.step.roots, self.one)
        weighed = weighing(self.stage.loss, self.step)
        if not are_finite([gradient for _, gradient in weighed.own_pairs()]):
            raise NotFiniteError("Gradients of the loss balancer's parameters must be finite, but got infinite or NaN entries.")
        if hasattr(self.stage.gradient, "reuse") and self.parts.inputs:
            reached = Reach(self.parts.above, self.step.roots).of_any(self.parts.inputs)
            at = _concerned(weighed, reached)
            weights = self.stage.gradient.reuse(self.step.at(at).present) if len(at) else None
            if weights is not None:
                return self._reused(start, weighed, at, weights)
        return self._measured(start, weighed)

    def _measured(self, start: AtLosses, weighed: Weighing) -> Report:
        found = self.stage.engine.measure(start, self.parts, whole=self.stage.sees == "jacobian")
        G = self._checked_gramian(found)
        E = weighed.jacobian  # (K, K): gradients of the weighted losses = E @ gradients of the losses
        at = self._balanced(found, weighed, G)  # indices of the tasks that the rule balances
        limits = (found.gramian.diagonal().cpu().clamp(min=0).sqrt(), self._head_lengths)
        G = E @ G @ E.T
        self.stage.warn_of_lonely_parameters(self.step, self.parts, found.reaches)
        if found.jacobian is None or not self.parts.inputs:
            weights = torch.ones_like(G[0])
            if self.parts.inputs and len(at):
                weights[at] = self._weights(found, at, G[at][:, at], E[at])
            shared_weights = self.factor * (weights[at] @ E[at] if self.parts.inputs else weights)
            head_weights = self.factor * (weights @ E if self.stage.heads == "weighted" else E.sum(dim=0))
            others = [*found.heads.weighted(head_weights.tolist()), *weighed.own_pairs(self.factor * self.scale)]
            largest = None if found.needs_pass else _largest((shared_weights, head_weights), limits)
            self._write(found, shared_weights.tolist(), others, largest)
            return weighed.report(self.step, weights, G, self._unshared(at))
        head_weights = self.factor * E.sum(dim=0)
        others = [*found.heads.weighted(head_weights.tolist()), *weighed.own_pairs(self.factor * self.scale)]
        change_rows(found.jacobian, E / self.scale)
        J = found.jacobian if len(at) == len(G) else found.jacobian[at.to(found.jacobian.device)]
        self._write_direction(found, self.scale * self.factor * self._direction(at, G[at][:, at], J), others)
        return weighed.report(self.step, None, G, self._unshared(at))

    def _checked_gramian(self, found: TaskGradients) -> Gramian:
        """Return the Gramian of the raw losses, unscaled, after one copy to the host. Shape (K, K)."""
        if self.parts.inputs and not any(found.reached):
            raise ValueError(_unreached(self.stage.source, len(self.parts.inputs)))
        numbers = torch.cat([found.gramian, found.heads.lengths(found.gramian.device)[None]]).cpu()
        found.gramian, self._head_lengths = numbers[:-1], numbers[-1]
        finite = found.gramian.diagonal().isfinite().tolist()
        lengths = self._head_lengths.isfinite().tolist()
        bad = [task for k, task in enumerate(self.step.tasks) if not finite[k] or not (lengths[k] or found.heads.is_finite(k))]
        if bad:
            raise NotFiniteError(f"Gradients must be finite, but those of {', '.join(bad)} are not. Look at the learning rate.")
        return found.gramian / self.scale**2

    def _balanced(self, found: TaskGradients, weighed: Weighing, G: Gramian) -> Tensor:
        """Return the indices of the tasks that the rule balances: those that reach the shared parameters."""
        if not self.parts.inputs:
            return torch.arange(len(G), device="cpu")
        reached = found.reaching
        if self.stage.zero == "absent":
            reached = [there and float(square) > 0 for there, square in zip(reached, G.diagonal(), strict=True)]
        return _concerned(weighed, reached)

    def _unshared(self, at: Tensor) -> tuple[str, ...]:
        balanced = set(at.tolist())
        return tuple(task for k, task in enumerate(self.step.tasks) if k not in balanced)

    def _weights(self, found: TaskGradients, at: Tensor, G: Gramian, E: Tensor) -> Weights:
        """Return the weights of the gradients of the weighted losses of the tasks ``at``. Shape (k,)."""
        step = self.step.at(at)
        weights = checked_weights(apply_rule(self.stage.gradient, step, G, **self._keywords(step)), len(G)).to(G)
        if self.stage.scale == "sum":
            total = float(weights.sum())
            return weights * (len(G) / total if total > 0 else 1.0)
        rounding = float(weights.abs() @ G.diagonal().clamp(min=0).sqrt()) ** 2 * _ROUNDING
        stretch = self._stretch(G, float(weights @ G @ weights), rounding)
        if self.parts.source == "parameters" and len(self.parts.inputs) < len(self.parts.trunk):
            stretch = self._stretch_of_the_whole(found.start, weights, G, E, stretch)
        self.stage.stretch.fill_(stretch)
        return weights * stretch

    def _stretch(self, G: Gramian, square: float, rounding: float) -> float:
        """Return the factor from a direction's length to that of the summed gradient, if that is asked for."""
        if self.stage.scale != "norm" or square <= rounding:  # a direction that is zero but for rounding stays so
            return 1.0
        return math.sqrt(max(float(G.sum()), 0.0) / square)

    def _stretch_of_the_whole(self, start: Start, weights: Weights, G: Gramian, E: Tensor, stretch: float) -> float:
        """Correct the factor where only some of the shared parameters were measured, so that all get the length meant.

        That is the length of the summed gradient with ``scale="norm"``, and the length of the measured direction for a rule
        whose length does not depend on the lengths of the gradients. Costs one or two backward passes.
        """
        fixed = self.stage.scale == "paper" and self.stage.fixed_length
        if not fixed and self.stage.scale != "norm":
            return stretch
        length = self._length(start, weights @ E)
        target = math.sqrt(max(float(weights @ G @ weights), 0.0)) if fixed else self._length(start, E.sum(dim=0))
        return target / length if 0 < length < math.inf and math.isfinite(target) else stretch

    def _length(self, start: Start, row_weights: Tensor) -> float:
        """Return the length of a weighted sum of all shared gradients, by a backward pass that keeps the graph."""
        with without_hooks(self.parts.trunk):
            gradients = weighted_sum(start, row_weights.tolist(), self.parts.trunk, keep=True)
        squares = [torch.linalg.vector_norm(g.to_dense()).double().cpu().square() for g in gradients if g is not None]
        return math.sqrt(float(sum(squares))) / self.scale

    def _direction(self, at: Tensor, G: Gramian, J: Jacobian) -> Direction:
        """Return the direction of a rule that sees the Jacobian. Shape (P,)."""
        step = self.step.at(at)
        direction = apply_rule(self.stage.gradient, step, J, **self._keywords(step))
        if not isinstance(direction, torch.Tensor) or direction.shape != J.shape[1:] or not direction.isfinite().all():
            raise ValueError(f"The gradient balancer must return a finite direction ({J.shape[1]},), but got {direction}.")
        direction = direction.detach()
        square = float(torch.linalg.vector_norm(direction, dtype=torch.float64)) ** 2
        return direction * self._stretch(G, square, 0.0)

    def _keywords(self, step: Step) -> dict[str, Tensor]:
        return {"losses": step.host} if takes(self.stage.gradient, "losses") else {}

    def _reused(self, start: AtLosses, weighed: Weighing, at: Tensor, solved: Weights) -> Report:
        """Take a step with known weights: one backward pass, and one through unweighted heads."""
        E, parts = weighed.jacobian, self.parts
        total = float(solved.sum())
        by_sum = self.stage.scale == "sum"
        stretch = (len(solved) / total if total > 0 else 1.0) if by_sum else float(self.stage.stretch)
        weights = torch.ones(len(E), dtype=torch.float64, device="cpu")
        weights[at] = solved.cpu().double() * stretch
        shared_weights = (self.factor * (weights[at] @ E[at])).tolist()
        head_weights = (self.factor * (weights @ E if self.stage.heads == "weighted" else E.sum(dim=0))).tolist()
        own = weighed.own_pairs(self.factor * self.scale)
        if parts.source == "features" and parts.features and walks_once(parts.below.functions):
            with without_hooks(parts.heads):
                heads = paired(parts.heads, weighted_sum(start, head_weights, parts.heads, keep=True))
            through = weighted_sum(start, shared_weights, parts.features)
            rows = Rows(1, [[None if gradient is None else flat(gradient)] for gradient in through])
            self._ordinary_backward(AtFeatures(parts.features, rows), [1.0], [*heads, *own])
            return weighed.report(self.step, weights, None, self._unshared(at))
        leaves = [*parts.heads, *parts.trunk]
        with without_hooks(leaves):
            if head_weights == shared_weights:
                gradients = weighted_sum(start, shared_weights, leaves)
            else:
                gradients = weighted_sum(start, head_weights, parts.heads, keep=True)
                gradients += weighted_sum(start, shared_weights, parts.trunk)
        pairs = paired(leaves, gradients)
        self._require_finite(pairs)
        accumulate([*pairs, *own])
        return weighed.report(self.step, weights, None, self._unshared(at))

    def _write(
        self, found: TaskGradients, shared_weights: list[float], others: list[LeafGradient], largest: float | None
    ) -> None:
        """Accumulate a weighted sum of the tasks' gradients, and the gradients of other leaves.

        Args:
            found: The tasks' gradients.
            shared_weights: Weight of each task's gradient of the shared parameters.
            others: Gradients of heads, and of the balancer's own parameters.
            largest: Bound on the entries; None if there is none.
        """
        if self._walks_once(found.start):
            self._ordinary_backward(found.start, shared_weights, others)
            return
        with without_hooks(self.parts.trunk):
            pairs = [*found.weighted(shared_weights), *others]
        if largest is None or any(largest > torch.finfo(dtype).max for dtype in {leaf.dtype for leaf, _ in pairs}):
            self._require_finite(pairs)
        accumulate(pairs)

    def _write_direction(self, found: TaskGradients, direction: Direction, others: list[LeafGradient]) -> None:
        """Accumulate a direction, of the parameters or of the features, and the gradients of other leaves."""
        pieces = found.cut(direction)
        if self.parts.source == "features":
            found.follow(pieces)
            self._write(found, [1.0], others, None)
            return
        pairs = [*paired(self.parts.inputs, pieces), *others]
        self._require_finite(pairs)
        accumulate(pairs)

    def _walks_once(self, start: Start) -> bool:
        return isinstance(start, AtFeatures) and self.parts.source == "features" and walks_once(self.parts.below.functions)

    def _ordinary_backward(self, start: Start, weights: list[float], others: list[LeafGradient]) -> None:
        """Run an ordinary backward pass, in which every leaf accumulates, for functions that need that."""
        outputs, gradients = start.together(weights)
        if (total := delivery(others)) is not None:
            outputs.append(total)
            gradients.append(torch.ones_like(total))
        before = [(leaf, leaf.grad) for leaf in (*self.parts.trunk, *(leaf for leaf, _ in others))]
        for leaf, _ in before:
            leaf.grad = None
        try:
            with start.entered():
                torch.autograd.backward(outputs, gradients)  # type: ignore[arg-type]
            self._require_finite([(leaf, leaf.grad) for leaf, _ in before if leaf.grad is not None])
        except BaseException:
            for leaf, gradient in before:
                leaf.grad = gradient
            raise
        for leaf, gradient in before:
            if gradient is not None:
                new, leaf.grad = leaf.grad, gradient
                if new is not None:
                    leaf.grad = added(gradient, new) if gradient.is_sparse else gradient.add_(new)

    def _require_finite(self, pairs: Sequence[LeafGradient]) -> None:
        if not are_finite([as_leaf(gradient, leaf) for leaf, gradient in pairs]):  # a cast can overflow
            raise NotFiniteError(
                f"Gradients must be finite, but the weighted sum of the gradients of {', '.join(self.step.tasks)} is not. "
                "Look at the learning rate, and at operations whose gradients overflow."
            )


def _unreached(source: Source, count: int) -> str:
    if source == "parameters":
        return f"A loss must reach a shared parameter, but none reaches any of the {count} tensors in shared."
    return (
        f"A loss must be computed from the features, but none reaches any of the {count} tensors in features. Give the very "
        "tensors that the heads use: DistributedDataParallel returns copies with static_graph or find_unused_parameters."
    )


def _concerned(weighed: Weighing, reached: Sequence[bool]) -> Tensor:
    """Return the indices of the tasks whose weighted losses reach what the tasks share."""
    R = torch.tensor(reached, dtype=torch.float64, device="cpu")
    return ((weighed.jacobian != 0).double() @ R > 0).nonzero().flatten()


def _largest(weights: Sequence[Tensor], lengths: Sequence[Tensor]) -> float:
    """Return a bound on the entries of weighted sums of gradients of the given lengths; NaN and infinity count as such."""
    bounds = [float(w.abs() @ length.nan_to_num(nan=math.inf)) for w, length in zip(weights, lengths, strict=True)]
    return math.inf if any(map(math.isnan, bounds)) else max(bounds)
