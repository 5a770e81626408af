"""Training runs in MLflow, written in batches. mlflow is imported only when a run starts."""

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

BATCH = 500  # metrics in one database write; MLflow accepts at most 1000
PARAMS = 100  # parameters that MLflow accepts in one call


class Tracker:
    """One MLflow run, as a context manager: FINISHED at its end, KILLED on Ctrl-C, FAILED on any other exception.

    The run is recorded on the server in ``MLFLOW_TRACKING_URI``, else in the SQLite file ``mlflow.db`` in ``folder``, next to
    a folder of artifacts. Metrics are buffered, written in batches, and written at the end, whatever ends the run. Of several
    ranks, only the first records.

    Args:
        experiment: Name of the problem; the MLflow experiment is ``balance/<experiment>``.
        folder: Output folder of the SQLite file and its artifacts, created if it does not exist.
        name: Name of the run.
        tags: Tags such as ``loss_method``, ``gradient_method`` and ``seed``; the git commit is added.
        params: The flattened configuration.
        parent: Id of the run that lists this run as a child.
        run_id: Id of a run to be continued, which keeps its parameters and tags; None for a new run.
        system_metrics: Also record the use of processor, memory, disk and network, every ten seconds.
        enabled: Record the run. False: nothing is recorded or imported.

    Raises:
        OSError: On entry, if the folder cannot be written or the server does not answer.
        ValueError: If ``system_metrics`` is set and psutil is not installed.
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
        self.seconds = 0.0  # spent in this class during the run
        if system_metrics and importlib.util.find_spec("psutil") is None:
            raise ValueError("system_metrics requires psutil, which is not installed. Use pip install psutil.")
        self._system_metrics = system_metrics
        self._monitor: Any = None
        self._client: Any = None
        self._experiment_id = ""
        self._buffer: list[Any] = []
        self._written: set[tuple[str, int]] = set()  # metrics and steps that are left out

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
            self.flush()
        finally:
            status = self.status if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
            self._client.set_terminated(self.run_id, status)
            self._client = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, without infinite numbers, which MLflow would store as large finite numbers."""
        if self._client is None:
            return
        from mlflow.entities import Metric  # noqa: PLC0415

        start = time.perf_counter()
        now = int(time.time() * 1000)
        new = {key: value for key, value in metrics.items() if (key, step) not in self._written and not math.isinf(value)}
        self._buffer += [Metric(key, value, now, step) for key, value in new.items()]
        if len(self._buffer) >= BATCH:
            self.flush()
        self.seconds += time.perf_counter() - start

    def flush(self) -> None:
        """Write the metrics that are buffered."""
        while self._client is not None and self._buffer:
            self._client.log_batch(self.run_id, metrics=self._buffer[:BATCH])
            del self._buffer[:BATCH]  # after a write without an error

    def skip_written(self) -> None:
        """Leave out metrics at steps that the run has already: a run that resumes from a checkpoint computes them again."""
        if self._client is None:
            return
        for key in self._client.get_run(self.run_id).data.metrics:
            if not key.startswith("system/"):
                self._written |= {(key, point.step) for point in self._client.get_metric_history(self.run_id, key)}

    def log_text(self, text: str, file: str) -> None:
        """Record a text as an artifact called ``file``."""
        if self._client is not None:
            self._client.log_text(self.run_id, text, file)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record a file as an artifact, in ``folder`` among the run's artifacts, or at the top for None."""
        if self._client is not None:
            self._client.log_artifact(self.run_id, str(file), folder)

    def log_dataset(self, name: str, *, digest: str, source: str, rows: int, context: str) -> None:
        """Record a data set that the run uses.

        Args:
            name: Name of the data set.
            digest: Short hash of its contents.
            source: Origin of the data set.
            rows: Number of samples.
            context: Use of the data set: ``training``, ``validation`` or ``testing``.
        """
        if self._client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

        profile, origin = json.dumps({"num_rows": rows}), json.dumps({"uri": source})
        dataset = Dataset(name, digest, source_type="code", source=origin, profile=profile)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_model(self, folder: Path, name: str = "model") -> None:
        """Record a model in MLflow's format in ``folder``, as ``runs:/<run id>/<name>``, unless the run has a model."""
        if self._client is None or self._client.get_run(self.run_id).outputs.model_outputs:
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

    def _start(self) -> None:
        client, self._experiment_id = connect(self.experiment, self.folder)
        is_resumed = self.run_id is not None
        parent = {} if self.parent is None else {"mlflow.parentRunId": self.parent}
        if is_resumed:
            client.update_run(self.run_id, status="RUNNING")
            for key, value in parent.items():
                client.set_tag(self.run_id, key, value)
        else:
            tags = self.tags | git_tags() | {"mlflow.source.type": "LOCAL"} | parent
            self.run_id = client.create_run(self._experiment_id, run_name=self.name, tags=tags).info.run_id
        self._log_missing_params(client)
        self._client = client
        if self._system_metrics:
            self._start_monitor(is_resumed=is_resumed)

    def _log_missing_params(self, client: Any) -> None:
        """Record the parameters that the run does not have yet: MLflow refuses to change a parameter."""
        from mlflow.entities import Param  # noqa: PLC0415

        recorded = client.get_run(self.run_id).data.params
        params = [Param(key, str(value)) for key, value in self.params.items() if key not in recorded]
        for first in range(0, len(params), PARAMS):
            client.log_batch(self.run_id, params=params[first : first + PARAMS])

    def _start_monitor(self, *, is_resumed: bool) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415

        uri = tracking_uri(self.folder)
        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=is_resumed, tracking_uri=uri)  # type: ignore[no-untyped-call]
        self._monitor.start()


def tracking_uri(folder: str | os.PathLike[str]) -> str:
    """Return the address of the tracking store: ``MLFLOW_TRACKING_URI``, else the SQLite file in ``folder``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(folder).expanduser().resolve() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """Redact the passwords in URLs."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def connect(experiment: str, folder: str | os.PathLike[str], *, create: bool = True) -> tuple[Any, str]:
    """Return an MLflow client, and the id of an experiment.

    Call this function once before several processes start, so that they do not create the database at the same time.

    Args:
        experiment: Full name of the MLflow experiment.
        folder: Output folder of the SQLite file and its artifacts, used if ``MLFLOW_TRACKING_URI`` is not set.
        create: Create the folder, the database and the experiment if they do not exist.

    Returns:
        The client, of type ``mlflow.MlflowClient``, and the id.

    Raises:
        FileNotFoundError: If the database or the experiment does not exist and ``create`` is False.
        OSError: If the folder cannot be written or the server does not answer.
    """
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    uri, artifacts = tracking_uri(folder), None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        path = Path(folder).expanduser().resolve()
        if not create and not (path / "mlflow.db").exists():
            raise FileNotFoundError(f"No recorded runs: {path / 'mlflow.db'} does not exist. Set output_dir=...")
        path.mkdir(parents=True, exist_ok=True)
        artifacts = (path / "artifacts").as_uri()
    try:
        with _one_retry():
            client = MlflowClient(tracking_uri=uri)
            existing = client.get_experiment_by_name(experiment)
            if existing is None and not create:
                raise FileNotFoundError(f"No recorded runs of '{experiment}' in {without_password(uri)}.")
            if existing is None:
                return client, client.create_experiment(experiment, artifact_location=artifacts)
    except (MlflowException, ImportError, DBAPIError) as error:
        raise OSError(without_password(f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}")) from None
    return client, str(existing.experiment_id)


@contextmanager
def _one_retry() -> Iterator[None]:
    """Reduce MLflow's retries, so that a server that does not answer is an error after seconds, not minutes."""
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
    """Return the rank of this process, which torchrun sets for torch.distributed."""
    return int(os.environ.get("RANK", "0"))


def git_tags() -> dict[str, str]:
    """Return the commit of the checkout with this file, and whether files are changed; empty outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return {}  # inside the checkout of another project
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git_dirty": str(dirty).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}
