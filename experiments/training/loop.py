"""Training of a network: epochs of steps, selection of an epoch on validation, one test."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf

from experiments.problems import base as problems
from experiments.recording.run_log import log_inputs, log_model, new_tracker, step_metrics
from experiments.training.checkpoint import Selection, checkpoint
from experiments.training.console import print_result, progress_bar
from experiments.training.costs import Costs
from experiments.training.data import TimedBatches, set_epoch, to_device
from experiments.training.evaluation import evaluate, mean_metrics
from experiments.training.schedule import Schedule
from experiments.training.step import build_optimizer, train_step

if TYPE_CHECKING:
    from balance import Report
    from balance.tracking import Tracker
    from experiments.problems.base import Batch
    from experiments.training.console import ProgressBar
    from experiments.training.run import Run


def train(run: Run, parent: str | None = None) -> dict[str, float]:
    """Train, select the epoch on validation, test it once.

    Args:
        run: As `experiments.training.run.prepare` returns it.
        parent: Id of the MLflow run under which this run is shown.

    Returns:
        Test metrics by name, and ``delta_m`` if single-task numbers exist.
    """
    training = Training(run)
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(run.config), encoding="utf-8")
    with new_tracker(run.config, run.folder.name, parent) as tracker, progress_bar(run) as bar, problems.by_design():
        log_inputs(tracker, run.config, run.data)
        for epoch in range(1, run.config.train.epochs + 1):
            training.run_epoch(epoch, tracker, bar)
            metrics = training.finish_epoch(epoch, tracker)
            bar.print_metrics(epoch, metrics)
        final = training.test()
        seconds = training.record_result(final, tracker)
    print_result(run, training.selection, final)
    run.console.print(f"{seconds:.1f} s, of which {tracker.seconds:.2f} s for tracking. Saved in {run.folder}", soft_wrap=True)
    return final


class Training:
    """State of a run while it trains: optimizer, learning rates, the selected epoch, costs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = build_optimizer(run)
        self.schedule = Schedule(self.optimizer, run.config.train, len(run.batches))
        self.selection = Selection(run)
        self.costs = Costs()
        self.step = 0  # steps made
        self.tests: list[dict[str, float]] = []  # of the epochs that train.report_last selects

    def run_epoch(self, epoch: int, tracker: Tracker, bar: ProgressBar) -> None:
        """Train on every batch once."""
        self.run.model.train()
        set_epoch(self.run.data.train, epoch)
        batches = TimedBatches(self.run.batches)
        for batch in batches:
            report = self.make_step(to_device(batch, self.run.config.device))
            if self.step % self.run.config.log_every == 0:
                tracker.log_metrics(step_metrics(report), self.step)
                bar.show_losses(report)
            self.step += 1
            bar.advance(epoch)
        self.run.balancer.end_epoch()
        tracker.log_metrics({"cost/waiting": batches.waiting_share()}, self.step)

    def make_step(self, batch: Batch) -> Report:
        """Make one step, and measure its time or its memory."""
        make = partial(train_step, self.run, self.optimizer, batch)
        if self.step == self.memory_step:
            self.optimizer.zero_grad()  # or freeing these gradients would be credited to the step
            report = self.costs.measure_memory(make, self.run.config.device)
        else:
            report = self.costs.measure_time(make)
        self.schedule.after_step()
        return report

    @property
    def memory_step(self) -> int:
        """The step whose memory is measured: not the first, which creates the optimizer's state, unless it is the only one."""
        steps: int = self.run.config.train.epochs * len(self.run.batches)
        return min(1, steps - 1)

    def finish_epoch(self, epoch: int, tracker: Tracker) -> dict[str, float]:
        """Evaluate the network after an epoch, and save it; return its validation metrics."""
        metrics = evaluate(self.run, self.run.data.validation)
        tracker.log_metrics({f"val/{name}": value for name, value in metrics.items()}, self.step)
        if epoch > self.run.config.train.epochs - (self.run.config.train.report_last or 0):
            self.tests.append(self.test_metrics(metrics))
        self.schedule.after_epoch(self.selection.update(epoch, metrics, checkpoint(self.run, epoch)))
        torch.save(checkpoint(self.run, epoch, self.optimizer), self.run.folder / "last.pt")
        return metrics

    def test_metrics(self, validation_metrics: dict[str, float]) -> dict[str, float]:
        """Return test metrics of the network as it is; where both splits are one object, it is not evaluated again."""
        data = self.run.data
        return validation_metrics if data.test is data.validation else evaluate(self.run, data.test)

    def test(self) -> dict[str, float]:
        """Load the selected epoch and return its test metrics, or the means that ``train.report_last`` asks for."""
        self.run.model.load_state_dict(self.selection.state["model"])
        final = mean_metrics(self.tests or [evaluate(self.run, self.run.data.test)])
        delta_m = self.selection.delta_m(final)
        return final if delta_m is None else final | {"delta_m": delta_m}

    def record_result(self, final: dict[str, float], tracker: Tracker) -> float:
        """Record test metrics, costs and the network; return the time of the run in seconds."""
        seconds = self.costs.seconds()
        metrics = {f"final/{name}": value for name, value in final.items()} | self.costs.metrics(seconds)
        tracker.log_metrics(metrics | {"best_epoch": self.selection.epoch}, self.step)
        (self.run.folder / "final.json").write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
        if self.run.config.log_model:
            log_model(tracker, self.run.model, self.run.data.validation, self.run.folder, self.run.console)
        return seconds
