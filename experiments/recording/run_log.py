"""What of a run goes into MLflow beside its metrics: configuration, data, checkpoints, the network."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from balance.config import flatten
from balance.tracking import Tracker
from experiments.recording.served_model import save_network
from experiments.recording.store import decides, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from experiments.problems.base import Batch
    from experiments.trainer import Run

HASHED = 100  # samples of a split


def tracker_of(run: Run, parent: str | None) -> Tracker:
    """The MLflow run, which writes below the output folder by default."""
    config = run.config
    tags = {"loss_method": config.loss_method, "gradient_method": str(config.gradient_method).lower(), "seed": str(config.seed)}
    tags |= {"kind": "baseline" if config.loss_method == "stl" else "run", "fingerprint": fingerprint(config)}
    return Tracker(
        config.experiment,
        config.output_dir,
        name=run.folder.name,
        tags=tags,
        params=flatten(config),
        parent=parent,
        system_metrics=config.system_metrics,
        enabled=config.track,
    )


def log_data(tracker: Tracker, run: Run) -> None:
    """Record the three splits, with a hash of the first samples of each that is not drawn anew every time."""
    if not tracker.enabled:
        return
    settings = {key: str(value) for key, value in run.config.data.items() if decides(f"data.{key}", run.config)}
    contexts = {"train": "training", "validation": "validation", "test": "testing"}
    for split, context in contexts.items():
        data: Any = getattr(run.data, split)
        hashed = hashlib.sha256(json.dumps([split, len(data), settings], sort_keys=True).encode())
        if split != "train":
            for tensor in tensors_of(data[list(range(min(len(data), HASHED)))]):
                hashed.update(tensor.numpy().tobytes())
        name = f"{run.config.experiment}-{split}"
        source = f"experiments/{run.config.experiment}"
        tracker.log_dataset(name, digest=hashed.hexdigest()[:8], source=source, rows=len(data), context=context)


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch, those of graphs too."""
    for part in batch:
        if isinstance(part, torch.Tensor):
            yield part
        else:
            yield from (value for _, value in sorted(part.to_dict().items()) if isinstance(value, torch.Tensor))


def log_model(tracker: Tracker, run: Run) -> None:
    """Record the network that was tested, in MLflow's format, and both checkpoints."""
    if not tracker.enabled:
        return
    data: Any = run.data.validation
    inputs = data[list(range(min(2, len(data))))][0]
    if not isinstance(inputs, torch.Tensor):
        notice = "MLflow serves arrays, not graphs: mlflow.pytorch.load_model gives this network back, nothing else."
        run.console.print(notice, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        save_network(run.model, inputs, Path(folder) / "model")
        tracker.log_model(Path(folder) / "model")
    for name in ("best.pt", "last.pt"):
        tracker.log_file(run.folder / name, "checkpoints")
