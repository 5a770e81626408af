"""The metrics of a network over a data set."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

from experiments.training.data import brought, in_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.data import Dataset

    from experiments.problems.base import Batch
    from experiments.trainer import Run


def evaluate(run: Run, data: Dataset[Batch]) -> dict[str, float]:
    """Metrics over all samples of a data set; what they remark on those of the test data is printed."""
    metrics = run.experiment.metrics()
    for metric in metrics.values():
        metric.to(run.config.device)
    run.model.eval()
    with torch.no_grad():
        for cpu_batch in in_order(data, run.config.train):
            batch = brought(cpu_batch, run.config.device)
            outputs, targets = run.model(batch[0]), run.experiment.targets(batch)
            for name, metric in metrics.items():
                task = name.partition("/")[0]
                metric.update(outputs[task], targets[task])
    if data is run.data.test:
        for name, metric in metrics.items():
            if remark := getattr(metric, "remark", str)():
                run.console.print(f"{name} is {remark}.", soft_wrap=True)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def mean_of(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over some epochs, at least one."""
    return {name: statistics.fmean(metrics[name] for metrics in epochs) for name in epochs[0]}
