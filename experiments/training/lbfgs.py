"""Steps of LBFGS after the epochs: on one fixed batch, with weights of the losses that are held during each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from balance.config import measured
from experiments.training.data import generator_state, set_epoch, set_generator_state, to_device
from experiments.training.lbfgs_checks import chosen_samples
from experiments.training.step import compute_losses, observe, observe_validation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from balance import Report
    from experiments.problems.base import Batch
    from experiments.training.run import Run


class LBFGSPhase:
    """LBFGS over all parameters of the network, on one batch.

    A balancer that changes the weights from one evaluation to the next would give the line search another function each time.
    So the balancer makes one ordinary step, whose gradient is discarded. LBFGS then minimises the sum of the losses with the
    total weights of that step, divided by their mean. Task-specific heads have these weights as well. Rules with state learn
    once per step, and parameters of the balancer itself keep their values.

    Args:
        run: The run; nothing is computed before the first step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        options = run.config.lbfgs
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.LBFGS(
            self.parameters,
            lr=options.lr,
            max_iter=options.max_iter,
            history_size=options.history_size,
            tolerance_grad=options.tolerance_grad,
            tolerance_change=options.tolerance_change,
            line_search_fn=None if options.line_search == "none" else options.line_search,
        )
        self.data: Any = None  # state of the generator of the training data before the batch was read, if it has one
        self.batch: Batch | None = None

    def step(self, number: int) -> tuple[Report, dict[str, float]]:
        """Make one step: weights of the losses, then iterations of LBFGS with these weights.

        Args:
            number: Number of the step in the run, which determines the validation batch of rules that need one.

        Returns:
            The balancer's report before the iterations, and the number of evaluations as a metric.
        """
        batch = self.read_batch()
        report = self.balance(batch)
        weights = held_weights(report)
        before = self.evaluations
        self.optimizer.step(lambda: self.evaluate(batch, weights))  # type: ignore[no-untyped-call]
        if self.run.balancer.needs_observation:
            observe(self.run, batch)
        observe_validation(self.run, number)
        self.run.balancer.end_epoch()
        return report, {"lbfgs/evaluations": float(self.evaluations - before)}

    @property
    def evaluations(self) -> int:
        """Number of evaluations so far of the losses and their gradients."""
        state = self.optimizer.state.get(self.parameters[0], {})
        return int(state.get("func_evals", 0))

    def balance(self, batch: Batch) -> Report:
        """Make a step of the balancer, and discard its gradients; return its report."""
        run = self.run
        shared = dict(run.model.trunk.named_parameters())
        features, losses = compute_losses(run, batch)
        measure = measured(shared, run.config.balancer.measure)
        report = run.balancer.backward(losses, shared=shared.values(), features=features, measure=measure)
        run.balancer.zero_grad()
        return report

    def evaluate(self, batch: Batch, weights: Mapping[str, float]) -> Tensor:
        """Return the weighted sum of the losses, and set the gradients of the network."""
        self.optimizer.zero_grad()
        losses = compute_losses(self.run, batch)[1]
        total = torch.stack([weight * losses[task] for task, weight in weights.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    def read_batch(self) -> Batch:
        """Return the batch of all steps: all training data, or ``lbfgs.samples`` of it, drawn with the run's seed."""
        run = self.run
        if self.batch is None:
            self.data = generator_state(run.data.train) if self.data is None else self.data
            set_epoch(run.data.train, run.config.train.epochs + 1)
            set_generator_state(run.data.train, self.data)
            self.batch = to_device(run.data.train[chosen_samples(run.config, run.data.train)], run.config.device)
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of LBFGS, and the state from which the batch is read again."""
        return {"optimizer": self.optimizer.state_dict(), "data": self.data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; from an empty one, begin."""
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.data = state["data"]


def held_weights(report: Report) -> dict[str, float]:
    """Return the total weights of a step by task, divided by their mean; a negative weight counts as zero.

    A loss with a negative weight would be maximised, and the sum has no minimum then. A gradient balancer that gives a
    direction has no weights: then these are the weights of the loss balancer.

    Args:
        report: Record of a step.

    Returns:
        Weights whose mean is one, or equal weights where no weight is positive.
    """
    weights = report.loss_weights if report.total_weights is None else report.total_weights
    weights = weights.detach().double().clamp(min=0)
    mean = weights.mean()
    weights = weights / mean if mean > 0 else torch.ones_like(weights)
    return dict(zip(report.tasks, weights.tolist(), strict=True))
