"""Training runs in MLflow, written in batches. mlflow is imported only when a run starts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import require_package
from .checkout import git_tags
from .description import (
    SINGLE_TASK,
    as_number,
    check_final,
    declared_tags,
    describe_run,
    task_of,
)
from .logger import Loggers, Status, status_of
from .server import connect, tracking_uri, without_password

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    from ..stage.balancer import Balancer
    from .logger import Logger

BATCH = 500  # metrics in one database write; MLflow accepts at most 1000
PARAMS = 100  # parameters that MLflow accepts in one call
FIXED = ("loss_method", "gradient_method", "seed")  # parameters that a resumed run must have as recorded


class Tracker:
    """One MLflow run, as a context manager: FINISHED at its end, KILLED on Ctrl-C, FAILED on any other exception.

    The run is recorded on the server in ``MLFLOW_TRACKING_URI``, else in the SQLite file ``mlflow.db`` in ``folder``, next to
    a folder of artifacts. Metrics are buffered, written in batches, and written at the end, whatever ends the run. Of several
    ranks, only the first records. `balance.compare` makes a table of the runs with final metrics, see `log_final`.

    Args:
        experiment: Name of the problem; the MLflow experiment is ``balance/<experiment>``.
        folder: Output folder of the SQLite file and its artifacts, created if it does not exist.
        balancer: The `Balancer` of the run: its methods and their options become tags and parameters.
        loss_method: Name of the loss method of a run without a balancer. ``"stl"`` is a network that was trained on one task
            only, a baseline of the other runs.
        gradient_method: Name of the gradient method of a run without a balancer.
        seed: Seed of the run. Runs that differ only in their seed are one row of the table.
        params: Further parameters. Runs that differ in one of them are different rows of the table.
        higher_is_better: Names of the final metrics that should be large; ``()`` if all should be small. None: not declared.
        baselines: Value of each final metric for a network that was trained on its task only, if it is known.
        name: Name of the run; None for methods and seed.
        tags: Further tags, which do not distinguish rows; the git commit of this library is added if it is a checkout.
        parent: Id of the run that lists this run as a child.
        run_id: Id of a run to be continued, which keeps its parameters and tags; None for a new run.
        loggers: Further loggers, such as `TensorBoard`, which record too and are closed with the run.
        system_metrics: Also record the use of processor, memory, disk and network, every ten seconds.
        enabled: Record the run in MLflow. False: mlflow is not imported, and only ``loggers`` record.

    Raises:
        OSError: On entry, if the folder cannot be written or the server does not answer.
        ModuleNotFoundError: On entry, if mlflow is not installed.
        ValueError: If an argument contradicts another, a declared name or value is wrong, or psutil is not installed but
            ``system_metrics`` is set. On entry, if the run to be continued does not exist or has other methods.
        TypeError: If an argument has the wrong type.
    """

    def __init__(
        self,
        experiment: str,
        folder: str | os.PathLike[str] = "runs",
        *,
        balancer: Balancer | None = None,
        loss_method: str | None = None,
        gradient_method: str | None = None,
        seed: int | None = None,
        params: Mapping[str, Any] | None = None,
        higher_is_better: Iterable[str] | None = None,
        baselines: Mapping[str, float] | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
        loggers: Iterable[Logger] = (),
        system_metrics: bool = False,
        enabled: bool = True,
    ) -> None:
        self.experiment = f"balance/{experiment}"
        self.folder = Path(folder).expanduser()
        described = describe_run(balancer, loss_method, gradient_method, seed)
        if repeated := described.params.keys() & (params or {}):
            raise ValueError(f"params must not repeat {', '.join(sorted(repeated))}, which the other arguments give.")
        self.tags = described.tags | declared_tags(higher_is_better, baselines) | dict(tags or {})
        self.params = described.params | dict(params or {})
        self.name = name or _name(self.params) or experiment
        self.parent = parent
        self.run_id = run_id
        self.enabled = enabled and _rank() == 0
        self.status: Status = "FINISHED"  # of the run, unless an exception ends it
        self.seconds = 0.0  # spent in this class during the run
        if system_metrics and importlib.util.find_spec("psutil") is None:
            raise ValueError("system_metrics requires psutil, which is not installed. Use pip install psutil.")
        self._system_metrics = system_metrics
        self._loggers = Loggers(loggers if _rank() == 0 else ())
        self._monitor: Any = None
        self._client: Any = None
        self._experiment_id = ""
        self._buffer: list[Any] = []
        self._written: set[tuple[str, int]] = set()  # metrics and steps that are left out
        self._last_step = 0

    def __enter__(self) -> Tracker:
        if self.enabled:
            require_package("mlflow", "track")
            self._start()
        self._loggers.set_tags(self.tags | {key: str(value) for key, value in self.params.items()})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(self.status if kind is None else status_of(kind))

    def close(self, status: Status = "FINISHED") -> None:
        """Write the metrics that are buffered and end the run; leaving the context does so."""
        try:
            self._loggers.close(status)
        finally:
            self._end(status)

    def _end(self, status: Status) -> None:
        if self._client is None:
            return
        try:
            if self._monitor is not None:
                self._monitor.finish()
            self.flush()
        finally:
            self._client.set_terminated(self.run_id, status)
            self._client = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, without infinite numbers, which MLflow would store as large finite numbers.

        Args:
            metrics: Numbers by name.
            step: The step, or another counter.

        Raises:
            RuntimeError: If the run has not started or has ended.
        """
        if self.enabled and self._client is None:
            raise RuntimeError(
                "The run has not started or has ended. Record metrics inside of `with Tracker(...) as tracker:`."
            )
        start = time.perf_counter()
        self._last_step = max(self._last_step, step)
        new = {key: value for key, value in metrics.items() if (key, step) not in self._written}
        self._loggers.log_metrics(new, step)
        if self._client is not None:
            self._buffer_metrics({key: value for key, value in new.items() if not math.isinf(value)}, step)
        self.seconds += time.perf_counter() - start

    def log_final(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record the test metrics with which `balance.compare` compares this run, under ``final/<task>/<metric>``.

        Args:
            metrics: Test metrics by ``<task>/<metric>``. An infinite value becomes NaN, which ranks last in a table.
            step: Step of the record; None for the last step that was recorded.

        Raises:
            ValueError: If a name has another form, or the run lacks methods, a seed or directions of the metrics.
            TypeError: If a value is no number.
            RuntimeError: If the run has not started or has ended.
        """
        check_final(metrics, self.tags, self.params)
        numbers = {f"final/{name}": as_number(name, value) for name, value in metrics.items()}
        if self.params["loss_method"] == "stl" and SINGLE_TASK not in self.tags:
            self.set_tags({SINGLE_TASK: task_of(metrics)})
        finite = {name: math.nan if math.isinf(number) else number for name, number in numbers.items()}
        self.log_metrics(finite, self._last_step if step is None else step)

    def _buffer_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415

        now = int(time.time() * 1000)
        self._buffer += [Metric(key, value, now, step) for key, value in metrics.items()]
        if len(self._buffer) >= BATCH:
            self.flush()

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
        self._loggers.log_text(text, file)
        if self._client is not None:
            self._client.log_text(self.run_id, text, file)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record a file as an artifact, in ``folder`` among the run's artifacts, or at the top for None."""
        self._loggers.log_file(file, folder)
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
        self.tags |= tags
        self._loggers.set_tags(tags)
        for key, value in tags.items() if self._client is not None else ():
            self._client.set_tag(self.run_id, key, value)

    def _start(self) -> None:
        client, self._experiment_id = connect(self.experiment, self.folder)
        is_resumed = self.run_id is not None
        parent = {} if self.parent is None else {"mlflow.parentRunId": self.parent}
        if is_resumed:
            new_tags = self._missing_tags(client) | parent
            client.update_run(self.run_id, status="RUNNING")
            for key, value in new_tags.items():
                client.set_tag(self.run_id, key, value)
        else:
            tags = self.tags | git_tags() | {"mlflow.source.type": "LOCAL"} | parent
            self.run_id = client.create_run(self._experiment_id, run_name=self.name, tags=tags).info.run_id
        self._log_missing_params(client)
        self._client = client
        if self._system_metrics:
            self._start_monitor(is_resumed=is_resumed)

    def _missing_tags(self, client: Any) -> dict[str, str]:
        """Return the tags that the run to be continued does not have yet, and read its other tags and its parameters.

        Raises:
            ValueError: If the run does not exist in this experiment, or has other methods or another seed.
        """
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            recorded = client.get_run(self.run_id)
        except MlflowException:
            recorded = None
        if recorded is None or recorded.info.experiment_id != self._experiment_id:
            place = without_password(tracking_uri(self.folder))
            raise ValueError(f"No run '{self.run_id}' of '{self.experiment}' in {place}. Leave run_id out for a new run.")
        for key in FIXED:
            before, now = recorded.data.params.get(key), str(self.params.get(key))
            if key in self.params and before not in (None, now):
                raise ValueError(f"Run '{self.run_id}' has {key}={before}, but got {now}. Leave run_id out for a new run.")
        missing = {key: value for key, value in self.tags.items() if key not in recorded.data.tags}
        self.tags = self.tags | recorded.data.tags
        self.params = recorded.data.params | self.params
        return missing

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


def _name(params: Mapping[str, Any]) -> str:
    """Return methods and seed of a run; empty without them."""
    if "loss_method" not in params:
        return ""
    methods = " + ".join(str(params[key]) for key in ("loss_method", "gradient_method") if params.get(key) is not None)
    return f"{methods}, seed {params['seed']}" if "seed" in params else methods


def _rank() -> int:
    """Return the rank of this process, which torchrun sets for torch.distributed."""
    return int(os.environ.get("RANK", "0"))
