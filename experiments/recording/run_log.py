"""Records of a run in MLflow: configuration, data, steps, checkpoints, network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from balance.comparison.store import decides
from balance.config import flatten
from balance.tracking import Tracker
from balance.tracking.description import SINGLE_TASK
from experiments.problems import base as problems
from experiments.recording.fingerprint import fingerprint
from experiments.recording.loggers import further_loggers
from experiments.recording.served_model import save_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig
    from rich.console import Console
    from torch import Tensor, nn

    from balance import Report
    from experiments.problems.base import Batch, Splits

MANY = 12  # tasks; for more of them, means and extremes stand in for single numbers
HASHED = 100  # samples of a split
CONTEXTS = {"train": "training", "validation": "validation", "test": "testing"}  # MLflow's names for the splits


def new_tracker(config: DictConfig, folder: Path, parent: str | None = None, run_id: str | None = None) -> Tracker:
    """Return the MLflow run of a training run; it starts, or is resumed, when it is entered.

    Args:
        config: Configuration of the run.
        folder: Folder of the run, which gives the run its name.
        parent: Id of the MLflow run under which this run is shown.
        run_id: Id of the MLflow run to resume; None for a new one.
    """
    tags = {"loss_method": config.loss_method, "gradient_method": str(config.gradient_method).lower(), "seed": str(config.seed)}
    tags |= {"kind": "baseline" if config.loss_method == "stl" else "run", "fingerprint": fingerprint(config)}
    problem = problems.find(config.experiment)
    if config.loss_method == "stl":
        tags[SINGLE_TASK] = problems.tasks_of(config)[config.loss.main_task]
    return Tracker(
        config.experiment,
        config.output_dir,
        higher_is_better=problem.HIGHER_IS_BETTER,
        name=folder.name,
        tags=tags,
        params=flatten(config),
        parent=parent,
        run_id=run_id,
        loggers=further_loggers(config, folder),
        system_metrics=config.system_metrics,
        enabled=config.track,
    )


def log_inputs(tracker: Tracker, config: DictConfig, splits: Splits) -> None:
    """Record the configuration and the three splits of the data."""
    tracker.log_text(OmegaConf.to_yaml(config), "config.yaml")
    if not tracker.enabled:
        return
    source = f"experiments/{config.experiment}"
    for split, context in CONTEXTS.items():
        data: Any = getattr(splits, split)
        digest = split_digest(config, split, data)
        tracker.log_dataset(f"{config.experiment}-{split}", digest=digest, source=source, rows=len(data), context=context)


def split_digest(config: DictConfig, split: str, data: Any) -> str:
    """Return a short hash of a split's settings and first samples.

    Samples of training data are left out, since they can be random.

    Args:
        config: Configuration of the run.
        split: Name of the split.
        data: Data of the split; an item, for a list of indices, is a batch.
    """
    settings = {key: str(value) for key, value in config.data.items() if decides(f"data.{key}", config)}
    content = hashlib.sha256(json.dumps([split, len(data), settings], sort_keys=True).encode())
    if split != "train":
        for tensor in batch_tensors(first_batch(data, HASHED)):
            content.update(tensor.numpy().tobytes())
    return content.hexdigest()[:8]


def first_batch(data: Any, size: int) -> Batch:
    """Return the first samples of a split as a batch, all of them if they are fewer."""
    batch: Batch = data[list(range(min(len(data), size)))]
    return batch


def batch_tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield the tensors of a batch, tensors of graphs included."""
    for part in batch:
        if isinstance(part, torch.Tensor):
            yield part
        else:
            yield from (value for _, value in sorted(part.to_dict().items()) if isinstance(value, torch.Tensor))


def step_metrics(report: Report) -> dict[str, float]:
    """Return `Report.as_metrics`, with mean and minimum of the cosines for many tasks: 100 tasks have 4950 cosines."""
    cosines, conflicts = report.cosines, report.conflicts
    if len(report.tasks) <= MANY or cosines is None or conflicts is None:
        return report.as_metrics()
    rows, columns = (~cosines.isnan()).triu(1).nonzero(as_tuple=True)
    pairs = cosines[rows, columns]
    summary = {"cosine/mean": pairs.mean().item(), "cosine/min": pairs.min().item()} if len(pairs) else {}
    return dataclasses.replace(report, gramian=None).as_metrics() | summary | {"conflicts": float(conflicts)}


def log_model(tracker: Tracker, network: nn.Module, inputs: Any, folder: Path, console: Console) -> None:
    """Record a network in MLflow's format, and its checkpoints.

    Args:
        tracker: Tracker of the run.
        network: Network that was tested.
        inputs: Two samples, or more, which give the shapes of the inputs.
        folder: Folder of the run, with both checkpoints.
        console: Console for a notice, if MLflow cannot serve the network.
    """
    if not tracker.enabled:
        return
    if not isinstance(inputs, torch.Tensor):
        notice = "MLflow serves arrays, not graphs: mlflow.pytorch.load_model loads this network, but no server can."
        console.print(notice, soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        save_network(network, inputs, Path(temporary) / "model")
        tracker.log_model(Path(temporary) / "model")
    for name in ("best.pt", "last.pt"):
        tracker.log_file(folder / name, "checkpoints")
