"""Runs recorded in MLflow, in batches. Imports mlflow only when a run starts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

BATCH = 500  # metrics in one database write; MLflow takes at most 1000
PARAMS = 100  # parameters that MLflow takes at once


class Tracker:
    """One MLflow run, as a context manager: FINISHED at its end, KILLED on Ctrl-C, FAILED on any other exception.

    The run goes to the server that ``MLFLOW_TRACKING_URI`` names, else into the SQLite file ``mlflow.db`` in ``folder``, with
    artifacts beside it. Metrics are buffered and written some hundred at a time, and in any case at the end, whatever ends
    the run. Where several processes train together, only the first of them records.

    Args:
        experiment: What is studied; the MLflow experiment is ``balance/<experiment>``.
        folder: Output folder, for the SQLite file and its artifacts. Created if need be.
        name: Name of the run.
        tags: Such as ``loss_method``, ``gradient_method``, ``seed``; the git commit is added.
        params: The flattened configuration.
        parent: Id of the run under which this one is shown.
        run_id: Id of a run to be continued; None for a new one.
        system_metrics: Also record the use of processor, memory, disk and network, every ten seconds.
        enabled: False: record nothing, import nothing.

    Raises:
        OSError: On entry, if the folder cannot be written or the server does not answer.
        ValueError: If ``system_metrics`` are wanted and psutil is not installed.
    """

    def __init__(
        self,
        experiment: str,
        folder: str | os.PathLike[str],
        *,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
        system_metrics: bool = False,
        enabled: bool = True,
    ) -> None:
        self.experiment = f"balance/{experiment}"
        self.folder = Path(folder).expanduser()
        self.name = name
        self.tags = dict(tags)
        self.params = dict(params)
        self.parent = parent
        self.run_id = run_id
        self.enabled = enabled and _rank() == 0
        self.status = "FINISHED"  # of the run, unless an exception ends it
        self.seconds = 0.0  # spent in this class while the run was on
        if system_metrics and importlib.util.find_spec("psutil") is None:
            raise ValueError("system_metrics need psutil, which is not installed. Use pip install psutil.")
        self._system_metrics = system_metrics
        self._monitor: Any = None
        self._client: Any = None
        self._experiment_id = ""
        self._buffer: list[Any] = []

    def __enter__(self) -> Tracker:
        if self.enabled:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._client is None:
            return
        try:
            if self._monitor is not None:
                self._monitor.finish()
            self._flush()
        finally:
            status = self.status if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
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

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record a file as an artifact, in a folder of the run's artifacts if one is named."""
        if self._client is not None:
            self._client.log_artifact(self.run_id, str(file), folder)

    def log_dataset(self, name: str, *, digest: str, source: str, rows: int, context: str) -> None:
        """Record which data was used.

        Args:
            name: Of the data set.
            digest: Short hash of its contents.
            source: Where it is from.
            rows: Number of samples.
            context: What it was used for: ``training``, ``validation``, ``testing``.
        """
        if self._client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

        profile, where = json.dumps({"num_rows": rows}), json.dumps({"uri": source})
        dataset = Dataset(name, digest, source_type="code", source=where, profile=profile)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_model(self, folder: Path, name: str = "model") -> None:
        """Record a model that was saved in MLflow's format; its address is then ``runs:/<run id>/<name>``."""
        if self._client is None:
            return
        from mlflow.entities import LoggedModelOutput  # noqa: PLC0415

        model = self._client.create_logged_model(self._experiment_id, name=name, source_run_id=self.run_id)
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        for key, value in tags.items() if self._client is not None else ():
            self._client.set_tag(self.run_id, key, value)

    def _flush(self) -> None:
        while self._buffer:
            self._client.log_batch(self.run_id, metrics=self._buffer[:BATCH])
            del self._buffer[:BATCH]  # only what has been written

    def _start(self) -> None:
        from mlflow.entities import Param  # noqa: PLC0415

        client, self._experiment_id = connect(self.experiment, self.folder)
        if self.run_id is not None:
            client.update_run(self.run_id, status="RUNNING")
            self._client = client
            return
        tags = self.tags | git_tags() | {"mlflow.source.type": "LOCAL"}
        if self.parent is not None:
            tags["mlflow.parentRunId"] = self.parent
        run_id = client.create_run(self._experiment_id, run_name=self.name, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in self.params.items()]
        for first in range(0, len(params), PARAMS):
            client.log_batch(run_id, params=params[first : first + PARAMS])
        self._client, self.run_id = client, run_id
        if self._system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415

            self._monitor = SystemMetricsMonitor(run_id, tracking_uri=tracking_uri(self.folder))  # type: ignore[no-untyped-call]
            self._monitor.start()


def tracking_uri(folder: str | os.PathLike[str]) -> str:
    """Where runs go: ``MLFLOW_TRACKING_URI``, else the SQLite file in ``folder``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(folder).expanduser().resolve() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """An address, or a text that holds some, for the eyes of others."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def connect(experiment: str, folder: str | os.PathLike[str], *, create: bool = True) -> tuple[Any, str]:
    """The MLflow client, and the id of an experiment.

    Call it once before several processes start, so that they do not create the database at the same time.

    Args:
        experiment: Full name of the MLflow experiment.
        folder: Output folder, for the SQLite file and its artifacts where no server is named.
        create: Create what is not there.

    Raises:
        OSError: If the folder cannot be written, the server does not answer, or the experiment is not there and must not be
            created.
    """
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    uri, artifacts = tracking_uri(folder), None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        place = Path(folder).expanduser().resolve()
        if not create and not (place / "mlflow.db").exists():
            raise FileNotFoundError(f"There are no runs: {place / 'mlflow.db'} is not there. Say where with output_dir=...")
        place.mkdir(parents=True, exist_ok=True)
        artifacts = (place / "artifacts").as_uri()
    try:
        with _one_retry():
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            if found is None and not create:
                raise FileNotFoundError(f"There are no runs of '{experiment}' in {without_password(uri)}.")
            if found is None:
                return client, client.create_experiment(experiment, artifact_location=artifacts)
    except (MlflowException, ImportError, DBAPIError) as error:
        raise OSError(without_password(f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}")) from None
    return client, str(found.experiment_id)


@contextmanager
def _one_retry() -> Iterator[None]:
    """A server that is not there is told within seconds; MLflow by itself tries for minutes."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _rank() -> int:
    """Number of this process among those that train together, as torchrun and torch.distributed tell it."""
    return int(os.environ.get("RANK", "0"))


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
