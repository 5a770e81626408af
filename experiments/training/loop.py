"""Training of a network: epochs of steps, selection of an epoch on validation, one test."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from experiments.config.schema import last_epoch
from experiments.problems import base as problems
from experiments.recording.run_log import first_batch, log_inputs, log_model, new_tracker, step_metrics
from experiments.training import interruption, ranks
from experiments.training.checkpoint import Selection, checkpoint
from experiments.training.checkpoint_files import load_newest, save_last
from experiments.training.console import print_result, progress_bar
from experiments.training.costs import Costs
from experiments.training.data import (
    TimedBatches,
    generator_state,
    order_state,
    resume_order,
    set_epoch,
    set_generator_state,
    to_device,
)
from experiments.training.evaluation import evaluate, mean_metrics
from experiments.training.interruption import Interrupted
from experiments.training.lbfgs import LBFGSPhase
from experiments.training.randomness import random_state, set_random_state
from experiments.training.resumption import finish, released
from experiments.training.run import closed
from experiments.training.schedule import Schedule
from experiments.training.step import build_optimizer, observe_validation, train_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from balance import Report
    from balance.tracking import Tracker
    from experiments.problems.base import Batch
    from experiments.training.console import ProgressBar
    from experiments.training.run import Run

SCHEDULED_FIRST = "Detected call of .lr_scheduler.step"  # a gradient scaler may skip the first step of the optimizer


def train(run: Run, parent: str | None = None) -> dict[str, float]:
    """Train, select the epoch on validation, test it once. A run whose folder has a checkpoint continues from there.

    Args:
        run: As `experiments.training.run.prepare` returns it.
        parent: Id of the MLflow run under which this run is shown.

    Returns:
        Test metrics by name, and ``delta_m`` if single-task numbers exist.

    Raises:
        Interrupted: If SIGTERM or SIGINT arrives; the run can be resumed.
    """
    tracker = new_tracker(run.config, run.folder, parent, run.run_id)
    with released(run.lock), closed(run.agent), interruption.noted(), problems.by_design():
        warnings.filterwarnings("ignore", message=SCHEDULED_FIRST)
        with tracker, progress_bar(run) as bar:
            log_inputs(tracker, run.config, run.data)
            training = Training(run, tracker, bar)
            training.resume()
            while training.epoch < last_epoch(run.config.train):
                training.run_next()
                metrics = training.finish_epoch()
                bar.print_metrics(training.epoch, metrics)
            final = training.test()
            seconds = training.record_result(final)
        finish(run.folder, final)
    print_result(run, training.selection, final)
    run.console.print(f"{seconds:.1f} s, of which {tracker.seconds:.2f} s for tracking. Saved in {run.folder}", soft_wrap=True)
    return final


class Training:
    """State of a run while it trains: optimizer, learning rates, the selected epoch, costs, and the position in the data."""

    def __init__(self, run: Run, tracker: Tracker, bar: ProgressBar) -> None:
        self.run = run
        self.tracker = tracker
        self.bar = bar
        self.optimizer = build_optimizer(run)
        self.schedule = Schedule(self.optimizer, run.config.train, len(run.batches))
        self.selection = Selection(run)
        self.costs = Costs()
        self.lbfgs = LBFGSPhase(run)
        self.epoch = 0  # epochs finished
        self.position = 0  # steps made in the epoch after them
        self.step = 0  # steps made
        self.tests: list[dict[str, float]] = []  # of the epochs that train.report_last selects
        self.history: list[dict[str, float]] = []  # validation metrics of all epochs
        self.saved_at = time.monotonic()

    def run_next(self) -> None:
        """Run an epoch or, after the last one, a step of LBFGS, which is evaluated and counted like an epoch."""
        steps = self.epoch - self.run.config.train.epochs  # of LBFGS, each with its evaluation
        if steps < 0:
            self.run_epoch()
        elif self.step == self.run.config.train.epochs * len(self.run.batches) + steps:
            self.run_lbfgs_step()  # otherwise it was made before the checkpoint from which the run continues

    def run_epoch(self) -> None:
        """Train on every batch once, or on the batches that are left of the epoch."""
        run = self.run
        run.model.train()
        set_epoch(run.data.train, self.epoch + 1)
        is_complete, before = self.position == len(run.batches), random_state()
        batches = TimedBatches(run.batches)
        if self.position:
            set_random_state(before)  # the seed of the epoch's data loader has been drawn before the checkpoint
        for batch in batches:
            self.train_on(batch)
            if self.position < len(run.batches):
                self.pause()
        if not is_complete:
            run.balancer.end_epoch()
            self.tracker.log_metrics({"cost/waiting": batches.waiting_share()}, self.step)

    def run_lbfgs_step(self) -> None:
        """Make one step of LBFGS, and log it."""
        self.run.model.train()
        report, metrics = self.lbfgs.step(self.step)
        if report.total_weights is None and self.epoch == self.run.config.train.epochs:
            notice = f"{self.run.config.gradient_method} gives a direction and no weights: LBFGS keeps the loss weights only."
            self.run.console.print(notice, soft_wrap=True)
        self.tracker.log_metrics(step_metrics(report) | metrics, self.step)
        self.bar.show_losses(report)
        self.step += 1
        self.bar.advance(self.epoch + 1)

    def train_on(self, batch: Batch | None) -> None:
        """Make one step, and log it."""
        report = self.make_step(batch and to_device(batch, self.run.config.device))
        if self.step % self.run.config.log_every == 0:
            further = {} if self.run.agent is None else self.run.agent.metrics()
            self.tracker.log_metrics(step_metrics(report) | further, self.step)
            self.bar.show_losses(report)
        self.step += 1
        self.position += 1
        self.bar.advance(self.epoch + 1)

    def make_step(self, batch: Batch | None) -> Report:
        """Make one step, and measure its time or its memory."""
        make = partial(self.observed_step, batch)
        if self.step == self.memory_step:
            self.optimizer.zero_grad()  # or freeing these gradients would be credited to the step
            report = self.costs.measure_memory(make, self.run.config.device)
        else:
            report = self.costs.measure_time(make)
        self.schedule.after_step()
        return report

    def observed_step(self, batch: Batch | None) -> Report:
        """Make one step, and let the balancer observe validation losses if it needs them; an agent does what follows a step."""
        report = train_step(self.run, self.optimizer, batch)
        observe_validation(self.run, self.step)
        if self.run.agent is not None:
            self.run.agent.after_step()
        return report

    @property
    def memory_step(self) -> int:
        """The step whose memory is measured: not the first, which creates the optimizer's state, unless it is the only one."""
        steps: int = self.run.config.train.epochs * len(self.run.batches)
        return min(1, steps - 1)

    def finish_epoch(self) -> dict[str, float]:
        """Evaluate the network after an epoch, and save it; return its validation metrics."""
        before = self.state()  # without the seeds that the data loaders of the evaluation draw
        try:
            metrics = evaluate(self.run, self.run.data.validation)
            tests = self.test_metrics(metrics) if self.is_reported else None
        except Interrupted:
            self.save(before)
            raise
        self.tracker.log_metrics({f"val/{name}": value for name, value in metrics.items()}, self.step)
        self.tests += [] if tests is None else [tests]
        self.history.append(metrics)
        self.epoch, self.position = self.epoch + 1, 0
        self.schedule.after_epoch(self.selection.update(self.epoch, metrics, checkpoint(self.run, self.epoch)))
        self.save(self.state())
        if number := interruption.received():
            raise Interrupted(number)
        return metrics

    @property
    def is_reported(self) -> bool:
        """True if the test metrics after the current epoch are among those that ``train.report_last`` asks for."""
        train = self.run.config.train
        return bool(self.epoch + 1 > last_epoch(train) - (train.report_last or 0))

    def test_metrics(self, validation_metrics: dict[str, float]) -> dict[str, float]:
        """Return test metrics of the network as it is; where both splits are one object, it is not evaluated again."""
        data = self.run.data
        return validation_metrics if data.test is data.validation else evaluate(self.run, data.test)

    def test(self) -> dict[str, float]:
        """Load the selected epoch and return its test metrics, or the means that ``train.report_last`` asks for."""
        self.run.model.load_state_dict(self.selection.state["model"])
        final = mean_metrics(self.tests or [evaluate(self.run, self.run.data.test)])
        delta_m, summarize = self.selection.delta_m(final), self.run.problem.summarize
        final |= {} if summarize is None else summarize(final, self.history)
        return final if delta_m is None else final | {"delta_m": delta_m}

    def record_result(self, final: dict[str, float]) -> float:
        """Record test metrics, costs and the network; return the time of the run in seconds."""
        seconds = self.costs.seconds()
        metrics = {f"final/{name}": value for name, value in final.items()} | self.costs.metrics(seconds)
        self.tracker.log_metrics(metrics | {"best_epoch": self.selection.epoch}, self.step)
        if self.run.config.log_model:
            agent = self.run.agent
            network, inputs = (self.run.model, first_batch(self.run.data.validation, 2)[0]) if agent is None else agent.policy()
            log_model(self.tracker, network, inputs, self.run.folder, self.run.console)
        return seconds

    def pause(self) -> None:
        """Save a checkpoint if ``train.checkpoint_minutes`` have passed, or a signal ends the run.

        Raises:
            Interrupted: If SIGTERM or SIGINT has arrived.
        """
        is_due = time.monotonic() - self.saved_at >= 60 * self.run.config.train.checkpoint_minutes
        number = interruption.received()
        if number or ranks.largest(is_due):
            self.save(self.state())
        if number:
            raise Interrupted(number)

    def save(self, state: Mapping[str, Any]) -> None:
        """Save a checkpoint, after the metrics before it are written."""
        self.tracker.flush()
        if ranks.is_first():
            save_last(state, self.run.folder)
        self.saved_at = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        run = self.run
        return checkpoint(run, self.epoch, self.optimizer) | {
            "position": self.position,
            "step": self.step,
            "scaler": run.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "selection": self.selection.state_dict(),
            "costs": self.costs.state_dict(),
            "lbfgs": self.lbfgs.state_dict(),
            "tests": list(self.tests),
            "history": list(self.history),
            "order": order_state(run.batches, self.position),
            "data": generator_state(run.data.train),
            "agent": None if run.agent is None else run.agent.state_dict(),
            "random": ranks.by_rank(random_state()),
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint in the run's folder, if any; metrics that are written are not written again."""
        if self.run.run_id is not None:
            self.tracker.skip_written()
        state = ranks.from_first(load_newest(self.run.folder) if ranks.is_first() else None)
        if state is not None:
            self.load_state(state)
            self.bar.resume(self.step)
            self.run.console.print(f"continued after step {self.step}, in epoch {self.epoch + 1}")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        run = self.run
        parts: dict[str, Any] = {"model": run.model, "balancer": run.balancer, "scaler": run.scaler}
        parts |= {name: getattr(self, name) for name in ("optimizer", "schedule", "selection", "costs")}
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.epoch, self.position, self.step = state["epoch"], state["position"], state["step"]
        self.lbfgs.load_state_dict(state.get("lbfgs", {}))  # checkpoints of earlier versions have none
        self.tests = list(state["tests"])
        self.history = list(state.get("history", []))
        resume_order(run.batches, state["order"], self.position)
        set_generator_state(run.data.train, state["data"])
        if run.agent is not None:
            run.agent.resume(state["agent"], self.position)
        if len(state["random"]) == ranks.size():  # otherwise each rank draws as at the beginning
            set_random_state(state["random"][ranks.rank()])
