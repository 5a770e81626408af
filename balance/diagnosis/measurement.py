"""Measurements on a user's problem: statistics of its task gradients, some training, and the price of each method."""

from __future__ import annotations

import copy
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..engine.graph import leaves
from ..profiling import Cost
from ..profiling import measure as measure_cost
from ..stage.balancer import Balancer
from .findings import quoted
from .statistics import Price, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from ..stage.report import Report
    from ..types import Gramian, Weights
    from .restore import Restoration

Outcome = TypeVar("Outcome")

ROUNDS, SECONDS = 12, 20  # rounds in which each method is timed, and seconds after which no further round begins
REPEATS, BUDGET = 3, 0.1  # timed steps in a round, and seconds after which no further step begins
ROUNDING = 1e-6  # length of a direction relative to the largest that its terms could add up to: less is rounding


class Measurement:
    """Backward passes of a user's losses, on a few batches.

    Args:
        losses: Function of a batch that returns the losses by task.
        tasks: K names.
        batches: At least two.
        shared: Parameters that the tasks share.
        restoration: Restoration of the model, which sets ``.grad`` to None between the passes.
    """

    def __init__(
        self,
        losses: Callable[[Any], Any],
        tasks: tuple[str, ...],
        batches: Sequence[Any],
        shared: Sequence[Tensor],
        restoration: Restoration,
    ) -> None:
        self.losses = losses
        self.tasks = tasks
        self.batches = batches
        self.shared = shared
        self.restoration = restoration

    def statistics(self) -> Statistics:
        """Compute the task gradients of every batch: one backward pass per task and batch."""
        stage = Balancer(self.tasks, gradient=_equal)
        losses, gramians, cosines = [], [], []
        for k in range(len(self.batches)):
            report = self.backward(stage, k, put_aside=True)
            self.restoration.zero_grad()
            assert report.gramian is not None
            assert report.cosines is not None
            losses.append(report.losses.cpu().double())
            gramians.append(report.gramian)
            cosines.append(report.cosines)
        return Statistics(self.tasks, torch.stack(losses), torch.stack(gramians), torch.stack(cosines))

    def train(self, model: nn.Module, steps: int, lr: float) -> None:
        """Train by Adam on the plain sum of the losses."""
        parameters = {id(p): p for p in (*model.parameters(), *self.shared) if p.requires_grad}
        optimizer = torch.optim.Adam(parameters.values(), lr)
        stage = Balancer(self.tasks)
        for step in range(steps):
            self.backward(stage, step % len(self.batches))
            optimizer.step()
            self.restoration.zero_grad()

    def backward(self, stage: Balancer, k: int, *, put_aside: bool = False) -> Report:
        """Run the forward and backward pass of batch ``k``.

        Args:
            stage: Balancer of the losses.
            k: Index of the batch.
            put_aside: Whether to put ``.grad`` of all leaf tensors aside that the losses reach.

        Returns:
            The report of the step.

        Raises:
            ValueError: If a task is missing.
        """
        losses = self.losses(self.batches[k])
        missing = [task for task in self.tasks if task not in losses]
        if missing:
            raise ValueError(
                f"losses must return every task for every batch, but for batch {k} {quoted(missing)} are missing. Choose "
                "batches that have all tasks."
            )
        if put_aside:
            self.restoration.put_aside(leaves(loss for loss in losses.values() if isinstance(loss, torch.Tensor)))
        return stage.backward(losses, shared=self.shared)

    def loss_stage(self, name: str, sequence: Iterable[Tensor]) -> Balancer | str:
        """Return a stage with a loss balancer, or the reason why it does not accept all measured losses.

        Args:
            name: Name of the loss balancer.
            sequence: Measured losses. Shapes (K,).
        """

        def build() -> Balancer:
            trial = Balancer(self.tasks, loss=name)
            for losses in sequence:
                trial.backward(losses.clone().requires_grad_())
            return Balancer(self.tasks, loss=name)

        return self._attempt(build)

    def gradient_stage(self, name: str) -> Balancer | str:
        """Return a stage with a gradient balancer, or the reason why it cannot be built."""
        return self._attempt(lambda: Balancer(self.tasks, gradient=name))

    def prices(self, stages: Sequence[Balancer | str]) -> tuple[Cost, list[Price]]:
        """Return the cost of a plain step and the prices of stages relative to it.

        All take turns and the quickest turn counts, since other work on the machine makes steps longer only.
        """
        plain = Balancer(self.tasks)
        baselines: list[Cost] = []
        rounds: list[list[Cost | str]] = []
        begin = time.perf_counter()
        for _ in range(ROUNDS):
            baselines.append(self._cost(plain))
            rounds.append([stage if isinstance(stage, str) else self._attempt(partial(self._cost, stage)) for stage in stages])
            if baselines[0].seconds >= BUDGET or time.perf_counter() - begin >= SECONDS:
                break  # such a long step, or such a long round, is timed well enough
        baseline = _least(baselines)
        prices = [_price(outcomes, baseline) for outcomes in zip(*rounds, strict=True)]
        reasons = [self._standstill(stage, price) for stage, price in zip(stages, prices, strict=True)]
        return baseline, [price._replace(reason=price.reason or r) for price, r in zip(prices, reasons, strict=True)]

    def _cost(self, stage: Balancer) -> Cost:
        """Measure a step on the first batch, observation included."""
        stage = copy.deepcopy(stage)  # whose state, such as K gradients, is gone afterwards

        def step() -> None:
            stage.backward(self.losses(self.batches[0]), shared=self.shared)
            if stage.needs_observation:
                with torch.no_grad():
                    stage.observe(self.losses(self.batches[0]))
            stage.zero_grad()
            self.restoration.zero_grad()

        return measure_cost(step, repeats=REPEATS, budget=BUDGET, device=self.shared[0].device)

    def _standstill(self, stage: Balancer | str, price: Price) -> str:
        """Return a reason if a gradient balancer moves the shared parameters at no batch, while equal weights do."""
        if isinstance(stage, str) or stage.gradient_balancer is None or price.cost is None:
            return ""
        for k in range(len(self.batches)):
            moves = self._attempt(partial(self._moves, stage, k))
            if moves:
                return moves if isinstance(moves, str) else ""
        return "its direction is zero at every batch, so that the shared parameters are not trained"

    def _moves(self, stage: Balancer, k: int) -> bool:
        """Return whether a step moves the shared parameters, or equal weights would not move them either."""
        report = self.backward(stage, k)
        moves = any(p.grad is not None and bool(p.grad.any()) for p in self.shared)
        self.restoration.zero_grad()
        assert report.gramian is not None
        weights = report.gradient_weights
        cancels = weights is not None and _is_rounding(report.gramian, weights)
        return (moves and not cancels) or _is_rounding(report.gramian, _equal(report.gramian))

    def _attempt(self, attempt: Callable[[], Outcome]) -> Outcome | str:
        try:
            return attempt()
        except Exception as error:  # noqa: BLE001 - whatever stops a method here is the reason not to choose it
            self.restoration.zero_grad()
            return str(error).partition("\n")[0] or type(error).__name__


def _equal(gramian: Gramian) -> Weights:
    return torch.ones_like(gramian[0])


def _is_rounding(gramian: Gramian, weights: Weights) -> bool:
    """Return whether the terms of a direction cancel, to rounding. Shapes (K, K), (K,)."""
    w = weights.to(gramian)
    longest = float(w.abs() @ gramian.diagonal().clamp(min=0).sqrt())
    return math.sqrt(max(float(w @ gramian @ w), 0)) <= ROUNDING * longest


def _least(costs: Sequence[Cost]) -> Cost:
    return Cost(min(cost.seconds for cost in costs), max(cost.bytes for cost in costs))


def _price(outcomes: Sequence[Cost | str], baseline: Cost) -> Price:
    for outcome in outcomes:
        if isinstance(outcome, str):
            return Price(None, math.nan, math.nan, outcome)
    cost = _least([outcome for outcome in outcomes if isinstance(outcome, Cost)])
    return Price(cost, cost.seconds / baseline.seconds, cost.bytes / baseline.bytes if baseline.bytes else math.nan)
