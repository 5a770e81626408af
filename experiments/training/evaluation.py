"""Metrics of a network over a data set."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

from experiments.training import interruption, ranks
from experiments.training.data import evaluation_batches, to_device
from experiments.training.interruption import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.utils.data import Dataset
    from torchmetrics import Metric

    from experiments.problems.base import Agent, Batch
    from experiments.training.run import Run


def evaluate(run: Run, data: Dataset[Batch]) -> dict[str, float]:
    """Return the metrics of the network over all samples of a data set; for the test data, print the metrics' remarks.

    The first rank evaluates, and the other ranks wait. Every rank must call it.

    Args:
        run: The network, and the metrics of its problem.
        data: A data set.

    Returns:
        Metrics by name.

    Raises:
        Interrupted: If a signal requests the end of the run.
    """
    metrics, number = ranks.from_first(measure(run, data) if ranks.is_first() else ({}, 0))
    if number:
        raise Interrupted(number)
    return metrics


@torch.no_grad()
def measure(run: Run, data: Dataset[Batch]) -> tuple[dict[str, float], int]:
    """Return the metrics in this process, and 0; no metrics, and the number of a signal, if one arrives."""
    metrics = run.problem.metrics()
    for metric in metrics.values():
        metric.to(run.config.device)
        metric.distributed_available_fn = lambda: False  # the other ranks wait, and evaluate nothing
    run.model.eval()
    for _ in update_by_batches(run, data, metrics) if run.agent is None else update_by_agent(run.agent, data, metrics):
        if number := interruption.received_here():
            return {}, number
    if data is run.data.test:
        print_remarks(run, metrics)
    return {name: metric.compute().item() for name, metric in metrics.items()}, 0


def update_by_batches(run: Run, data: Dataset[Batch], metrics: Mapping[str, Metric]) -> Iterator[None]:
    """Update the metrics with the network's outputs, batch by batch."""
    for cpu_batch in evaluation_batches(data, run.config.train):
        batch = to_device(cpu_batch, run.config.device)
        outputs, targets = run.model(batch[0]), run.problem.targets(batch)
        for name, metric in metrics.items():
            task = name.partition("/")[0]
            metric.update(outputs[task], targets[task])
        yield


def update_by_agent(agent: Agent, data: Dataset[Batch], metrics: Mapping[str, Metric]) -> Iterator[None]:
    """Update the metrics with the values that an agent has for them, part by part."""
    for values in agent.evaluate(data):
        for name, value in values.items():
            metrics[name].update(value)
        yield


def print_remarks(run: Run, metrics: Mapping[str, Metric]) -> None:
    """Print what metrics remark on their values, such as classes that do not occur."""
    for name, metric in metrics.items():
        if remark := getattr(metric, "remark", str)():
            run.console.print(f"{name} is {remark}.", soft_wrap=True)


def mean_metrics(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over at least one epoch."""
    return {name: statistics.fmean(metrics[name] for metrics in epochs) for name in epochs[0]}
