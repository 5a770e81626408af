"""The tracking store of MLflow: a server, or a SQLite file in the output folder."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import suggestion

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "balance/"  # of the names of MLflow experiments


def tracking_uri(folder: str | os.PathLike[str]) -> str:
    """Return the address of the tracking store: ``MLFLOW_TRACKING_URI``, else the SQLite file in ``folder``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_database(Path(folder))}"


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
    artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else _artifacts(Path(folder), create=create)
    with _client(folder) as client:
        existing = client.get_experiment_by_name(experiment)
        if existing is None and not create:
            place, known = without_password(tracking_uri(folder)), suggestion(experiment, map(_full, _experiments(client)))
            raise FileNotFoundError(f"No recorded runs of '{experiment}' in {place}.{known}")
        if existing is None:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
    return client, str(existing.experiment_id)


def recorded_experiments(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the recorded experiments, sorted; none without a database.

    Args:
        folder: Output folder of the SQLite file, used if ``MLFLOW_TRACKING_URI`` is not set.

    Raises:
        OSError: If the server does not answer.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") and not _database(Path(folder)).exists():
        return []
    with _client(folder) as client:
        return _experiments(client)


def _experiments(client: Any) -> list[str]:
    names = (experiment.name for experiment in client.search_experiments())
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def _full(name: str) -> str:
    return f"{PREFIX}{name}"


def _database(folder: Path) -> Path:
    return folder.expanduser().resolve() / "mlflow.db"


def _artifacts(folder: Path, *, create: bool) -> str:
    """Return the address of the artifacts next to the database, whose folder is created if it may be."""
    database = _database(folder)
    if not create and not database.exists():
        raise FileNotFoundError(f"No recorded runs: {database} does not exist. Give the folder of the runs.")
    database.parent.mkdir(parents=True, exist_ok=True)
    return (database.parent / "artifacts").as_uri()


@contextmanager
def _client(folder: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield an MLflow client; an error of the store becomes an OSError, without the password in its address."""
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    uri = tracking_uri(folder)
    try:
        with _one_retry():
            yield MlflowClient(tracking_uri=uri)
    except (MlflowException, ImportError, DBAPIError) as error:
        raise OSError(without_password(f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]}")) from None


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
