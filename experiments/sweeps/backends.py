"""Backends of joblib on a running Ray or Dask cluster."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

from joblib import parallel_config

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def connected(backend: str, address: str | None) -> Iterator[int]:
    """Let joblib run on the cluster in this context; yield the number of runs that the cluster takes at a time.

    Args:
        backend: ``"ray"`` or ``"dask"``.
        address: Address of the running cluster. None: value of ``RAY_ADDRESS`` or ``DASK_SCHEDULER_ADDRESS``, or Ray on this
            machine.

    Yields:
        The number of runs that the cluster takes at a time.

    Raises:
        ValueError: If the library is not installed, the address is missing, or a Dask worker would run several jobs at a time.
        OSError: If the cluster does not answer.
    """
    with _ray(address) if backend == "ray" else _dask(address) as workers:
        yield workers


@contextmanager
def _ray(address: str | None) -> Iterator[int]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; without it, Ray warns
    try:
        import ray  # noqa: PLC0415
        from ray.util.joblib import register_ray  # noqa: PLC0415
    except ImportError:
        raise ValueError("--backend=ray needs Ray. Use pip install -e . --group ray.") from None
    try:
        _check_reachable(address or os.environ.get("RAY_ADDRESS") or "auto")
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"The Ray cluster does not answer: {reason} Start one with 'ray start --head'.") from None
    try:
        register_ray()
        with parallel_config(backend="ray"):
            yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check within seconds that something listens at an address; Ray itself tries for minutes.

    Raises:
        ValueError: If the address has another form.
        OSError: If nothing listens.
    """
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(f"its address must be HOST:PORT, but got '{address}'.")
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _dask(address: str | None) -> Iterator[int]:
    address = address or os.environ.get("DASK_SCHEDULER_ADDRESS")
    try:
        from distributed import Client  # noqa: PLC0415
    except ImportError:
        raise ValueError("--backend=dask needs Dask. Use pip install -e . --group dask.") from None
    if address is None:
        raise ValueError("--backend=dask needs the address of the scheduler. Use --cluster=tcp://HOST:8786.")
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise OSError(f"The Dask scheduler at {address} does not answer: {str(error).splitlines()[0]}") from None
    with client:
        threads = [worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        _check_dask_workers(threads, address)
        with parallel_config(backend="dask"):
            yield len(threads)


def _check_dask_workers(threads: list[int], address: str) -> None:
    """Check that the scheduler has workers, and that no worker runs two jobs in one process.

    Two jobs in one process would share torch's seed and number of threads.

    Raises:
        ValueError: If the scheduler has no workers, or a worker has several threads.
    """
    if not threads:
        raise ValueError(
            f"The Dask scheduler at {address} has no workers. Start some with 'dask worker {address} --nthreads 1'."
        )
    if max(threads) > 1:
        raise ValueError(f"Each Dask worker must have one thread, but got {max(threads)} threads. Use --nthreads 1.")
