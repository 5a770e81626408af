"""Runs recorded in MLflow, in batches. Imports mlflow only when a run starts."""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

BATCH = 500  # metrics in one database write; MLflow takes at most 1000


class Tracker:
    """One MLflow run, as a context manager: FINISHED at its end, KILLED on Ctrl-C, FAILED on any other exception.

    The run goes to the server that ``MLFLOW_TRACKING_URI`` names, else into the SQLite file ``mlflow.db`` in ``folder``, with
    artifacts beside it. Metrics are buffered and written some hundred at a time, and in any case at the end, whatever ends
    the run.

    Args:
        experiment: What is studied; the MLflow experiment is ``balance/<experiment>``.
        folder: Output folder, for the SQLite file and its artifacts. Created if need be.
        name: Name of the run.
        tags: Such as ``loss_method``, ``gradient_method``, ``seed``; the git commit is added.
        params: The flattened configuration.
        enabled: False: record nothing, import nothing.

    Raises:
        OSError: On entry, if the folder cannot be written or the server does not answer.
    """

    def __init__(
        self,
        experiment: str,
        folder: str | os.PathLike[str],
        *,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        enabled: bool = True,
    ) -> None:
        self.experiment = f"balance/{experiment}"
        self.folder = Path(folder).expanduser()
        self.name = name
        self.tags = dict(tags)
        self.params = dict(params)
        self.enabled = enabled
        self.seconds = 0.0  # spent in this class while the run was on
        self.run_id: str | None = None
        self._client: Any = None
        self._buffer: list[Any] = []

    def __enter__(self) -> Tracker:
        if self.enabled:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._client is None:
            return
        try:
            self._flush()
        finally:
            status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
            self._client.set_terminated(self.run_id, status)
            self._client = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. Infinite ones are left out, since MLflow would store them as large finite numbers."""
        if self._client is None:
            return
        from mlflow.entities import Metric  # noqa: PLC0415

        start = time.perf_counter()
        now = int(time.time() * 1000)
        self._buffer += [Metric(key, value, now, step) for key, value in metrics.items() if not math.isinf(value)]
        if len(self._buffer) >= BATCH:
            self._flush()
        self.seconds += time.perf_counter() - start

    def log_text(self, text: str, file: str) -> None:
        """Record a text as an artifact called ``file``."""
        if self._client is not None:
            self._client.log_text(self.run_id, text, file)

    def _flush(self) -> None:
        while self._buffer:
            self._client.log_batch(self.run_id, metrics=self._buffer[:BATCH])
            del self._buffer[:BATCH]  # only what has been written

    def _start(self) -> None:
        from mlflow.entities import Param, RunTag  # noqa: PLC0415

        client, experiment_id = connect(self.experiment, self.folder)
        run_id = client.create_run(experiment_id, run_name=self.name).info.run_id
        tags = self.tags | git_tags() | {"mlflow.source.type": "LOCAL"}
        client.log_batch(
            run_id,
            params=[Param(key, str(value)) for key, value in self.params.items()],
            tags=[RunTag(key, str(value)) for key, value in tags.items()],
        )
        self._client, self.run_id = client, run_id


def tracking_uri(folder: str | os.PathLike[str]) -> str:
    """Where runs go: ``MLFLOW_TRACKING_URI``, else the SQLite file in ``folder``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(folder).expanduser().resolve() / 'mlflow.db'}"


def connect(experiment: str, folder: str | os.PathLike[str]) -> tuple[Any, str]:
    """The MLflow client, and the id of an experiment, which is created if need be.

    Call it once before several processes start, so that they do not create the database at the same time.

    Args:
        experiment: Full name of the MLflow experiment.
        folder: Output folder, for the SQLite file and its artifacts where no server is named. Created if need be.

    Raises:
        OSError: If the folder cannot be written or the server does not answer.
    """
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    uri, artifacts = tracking_uri(folder), None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        place = Path(folder).expanduser().resolve()
        place.mkdir(parents=True, exist_ok=True)
        artifacts = (place / "artifacts").as_uri()
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
    except MlflowException as error:
        raise OSError(f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}") from error
    return client, str(found.experiment_id)


def git_tags() -> dict[str, str]:
    """Commit of the checkout that holds this file, and whether it had changes; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return {}  # installed into some other project's checkout
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git_dirty": str(dirty).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}
