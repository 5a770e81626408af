"""The runs, curves and sweeps of an experiment in MLflow."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tracking import connect, tracking_uri, without_password
from ..tracking.description import BASELINES, HIGHER_IS_BETTER, SINGLE_TASK
from .recorded_run import RecordedRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Entries of a configuration that do not decide the result of a run; data.source describes the files of data.path
BOOKKEEPING = frozenset(
    {
        *("chosen_by", "output_dir", "resume", "track", "loggers", "log_every", "log_model", "system_metrics"),
        *(
            "balancer.engine",
            "balancer.memory",
            "data.cache",
            "data.workers",
            "data.processes",
            "model.cache",
            "model.separate_passes",
        ),
        *("train.num_workers", "train.eval_batch_size", "train.threads", "train.checkpoint_minutes", "train.micro_batches"),
    }
)
USERS_DATA = ("jsonl",)  # values of data.source for files of the user, where data.path decides the result
# Values in runs that were recorded before these entries existed
EARLIER: Mapping[str, Any] = {
    "train.precision": "fp32",
    "train.optimizer": "adam",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "train.validation_interval": 1,
    "balancer.metric": "gradients",
    "balancer.warmup": 0,
    "train.lbfgs_steps": 0,
    "lbfgs.samples": None,
    "lbfgs.max_iter": 20,
    "lbfgs.history_size": 50,
    "lbfgs.lr": 1.0,
    "lbfgs.line_search": "strong_wolfe",
    "lbfgs.tolerance_grad": 1e-9,
    "lbfgs.tolerance_change": 1e-12,
}
# The same for options of loss balancers, by the name of the method
EARLIER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"go4align": {"relative_step": False}}
SEPARATE = ("experiment", "loss_method", "gradient_method", "seed")  # entries that are fields of a `RecordedRun`
CURVES = ("loss/", "weight/", "gradient_weight/", "cosine/", "conflicts", "val/")


class Store:
    """The MLflow experiment ``balance/<experiment>``, in ``output_dir`` or on the server that ``MLFLOW_TRACKING_URI`` names.

    Args:
        experiment: Name of the experiment.
        output_dir: Folder of the SQLite file, where no server is named.
        create: Whether a missing experiment is created.

    Raises:
        OSError: If the server does not answer, or the experiment is missing and must not be created.
    """

    def __init__(self, experiment: str, output_dir: str, *, create: bool = False) -> None:
        self.experiment = experiment
        self.client, self.experiment_id = connect(f"balance/{experiment}", output_dir, create=create)
        self.place = without_password(tracking_uri(output_dir))  # for messages

    def search(self, condition: str = "") -> list[Any]:
        """Return all MLflow runs that fulfil a condition, newest first."""
        runs: list[Any] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token or None)
            runs += page
            token = page.token or None
        return runs

    def runs(self) -> list[RecordedRun]:
        """Return the runs with methods that have ended, newest first."""
        return [as_run(run) for run in self.search("attributes.status != 'RUNNING'") if "loss_method" in run.data.params]

    def finished(self) -> set[str]:
        """Return the fingerprints of the finished runs."""
        return {run.fingerprint for run in self.runs() if run.finished}

    def chosen(self, run_ids: Sequence[str]) -> list[RecordedRun]:
        """Return runs by id; the id of a sweep stands for all its runs.

        Raises:
            ValueError: If an id is unknown.
        """
        ended = {run.run_id: run for run in self.runs()}
        chosen: dict[str, RecordedRun] = {}
        for run_id in run_ids:
            children = [run.info.run_id for run in self.search(f"tags.`mlflow.parentRunId` = '{run_id}'")]
            runs = [ended[child] for child in (run_id, *children) if child in ended]
            if not runs:
                raise ValueError(f"No run '{run_id}' of '{self.experiment}' has ended in {self.place}.")
            chosen |= {run.run_id: run for run in runs}
        return list(chosen.values())

    def id_of(self, name: str) -> str | None:
        """Return the id of the run with a name, which is unique for runs of the trainer; None without such a run."""
        return next((run.info.run_id for run in self.search(f"tags.`mlflow.runName` = '{name}'")), None)

    def close_children(self, run_id: str) -> None:
        """Mark the runs of an interrupted sweep that are still RUNNING as KILLED."""
        for run in self.search(f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"):
            self.client.set_terminated(run.info.run_id, "KILLED")

    def sweep(self, plan: str = "") -> Any:
        """Return the newest MLflow run of a sweep, with this plan if one is given; None without such a run."""
        condition = f"tags.sweep = '{plan}'" if plan else "tags.kind = 'sweep'"
        return next(iter(self.search(condition)), None)

    def sweep_of(self, runs: Sequence[RecordedRun]) -> Any:
        """Return the MLflow run of the sweep that contains all these runs; None without such a sweep."""
        parents = {self.client.get_run(run.run_id).data.tags.get("mlflow.parentRunId") for run in runs}
        parent = parents.pop() if len(parents) == 1 else None
        return None if parent is None else self.client.get_run(parent)

    def curves(self, run_ids: Iterable[str], prefixes: tuple[str, ...] = CURVES) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return steps (T,) and means over the runs (T,) of the metrics that the runs logged during training, by name.

        Args:
            run_ids: Identifiers of the runs in MLflow.
            prefixes: Beginnings of the names of the metrics.
        """
        histories: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run_id in run_ids:
            for key in filter(lambda key: key.startswith(prefixes), self.client.get_run(run_id).data.metrics):
                for point in self.client.get_metric_history(run_id, key):
                    histories[key][point.step].append(point.value)
        return {
            key: (np.array(sorted(history)), np.array([np.mean(history[step]) for step in sorted(history)]))
            for key, history in histories.items()
        }


def as_run(run: Any) -> RecordedRun:
    """Convert an MLflow run with methods."""
    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    if "fingerprint" in tags:  # of the trainer, whose entries of today earlier runs lack
        params = complete(params)
    higher_is_better, baselines = (json.loads(tags.get(name, "null")) for name in (HIGHER_IS_BETTER, BASELINES))
    gradient = params.get("gradient_method")
    return RecordedRun(
        run_id=run.info.run_id,
        loss_method=params["loss_method"],
        gradient_method=None if gradient in (None, "None") else gradient,
        seed=int(params["seed"]),
        settings={key: value for key, value in params.items() if decides(key, params) and key not in SEPARATE},
        metrics={
            key.removeprefix("final/"): value
            for key, value in metrics.items()
            if key.startswith("final/") and key.count("/") == 2
        },
        finished=run.info.status == "FINISHED",
        step_ms=metrics.get("cost/step_ms", math.nan),
        step_mib=metrics.get("cost/step_mib", math.nan),
        fingerprint=tags.get("fingerprint", ""),
        configuration=tags.get("configuration", ""),
        higher_is_better=None if higher_is_better is None else frozenset(higher_is_better),
        baselines=baselines,
        task=tags.get(SINGLE_TASK, ""),
    )


def complete(settings: Mapping[str, str]) -> dict[str, str]:
    """Return recorded settings, with the entries that did not exist when they were recorded."""
    has_optimizer = "train.optimizer" in settings  # and the options of that optimizer, which may be another one
    known = {**EARLIER, **earlier_options(settings.get("loss_method", ""))}
    earlier = {key: str(value) for key, value in known.items() if not (has_optimizer and key.startswith("optimizer."))}
    return earlier | dict(settings)


def earlier_options(loss_method: str) -> dict[str, Any]:
    """Return values of options in runs that were recorded before these options existed, by dotted key.

    Args:
        loss_method: Name, or several names joined by ``+``.
    """
    names = [name.strip() for name in loss_method.split("+")]
    return {
        f"loss.{option}" if len(names) == 1 else f"loss.{name}.{option}": value
        for name in names
        for option, value in EARLIER_OPTIONS.get(name, {}).items()
    }


def decides(key: str, settings: Mapping[str, Any]) -> bool:
    """Return whether an entry of a configuration decides the result of a run.

    The size of evaluation batches does in the published protocol, which averages over batches. The path does where the files
    are the user's.

    Args:
        key: Dotted key.
        settings: All entries.
    """
    if key == "data.path":
        return settings.get("data.source") in USERS_DATA
    return key not in BOOKKEEPING or (key == "train.eval_batch_size" and settings.get("protocol") == "paper")
