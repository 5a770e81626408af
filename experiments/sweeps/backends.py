"""joblib's backends on a running Ray or Dask cluster."""

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
    """Let joblib run on the cluster while this context lasts; gives the number of runs that it takes at a time.

    Args:
        backend: ``"ray"`` or ``"dask"``.
        address: Of the running cluster; None: as ``RAY_ADDRESS`` or ``DASK_SCHEDULER_ADDRESS`` says, or Ray on this machine.

    Raises:
        ValueError: If the library is not installed, no address is known, or a Dask worker would run several at a time.
        OSError: If the cluster does not answer.
    """
    with _ray(address) if backend == "ray" else _dask(address) as workers:
        yield workers


@contextmanager
def _ray(address: str | None) -> Iterator[int]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default, of which it warns
    try:
        import ray  # noqa: PLC0415
        from ray.util.joblib import register_ray  # noqa: PLC0415
    except ImportError:
        raise ValueError("--backend=ray needs Ray. Use pip install 'mtl-balance[ray]'.") from None
    try:
        _knock(address or os.environ.get("RAY_ADDRESS") or "auto")
        ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise OSError(f"The Ray cluster does not answer: {told} Start one with 'ray start --head'.") from None
    try:
        register_ray()
        with parallel_config(backend="ray"):
            yield int(ray.cluster_resources().get("CPU", 1))
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise within seconds where nobody listens; Ray by itself tries for minutes."""
    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(f"its address must be HOST:PORT, but is '{address}'.")
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _dask(address: str | None) -> Iterator[int]:
    address = address or os.environ.get("DASK_SCHEDULER_ADDRESS")
    try:
        from distributed import Client  # noqa: PLC0415
    except ImportError:
        raise ValueError("--backend=dask needs Dask. Use pip install 'mtl-balance[dask]'.") from None
    if address is None:
        raise ValueError("--backend=dask needs the address of the scheduler. Use --cluster=tcp://HOST:8786.")
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise OSError(f"The Dask scheduler at {address} does not answer: {str(error).splitlines()[0]}") from None
    with client:
        threads = [worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        if not threads:
            raise ValueError(
                f"The Dask scheduler at {address} has no workers. Start some with 'dask worker {address} --nthreads 1'."
            )
        if max(threads) > 1:  # runs would share one process, and with it torch's seed and number of threads
            raise ValueError(
                f"Each Dask worker must run one thing at a time, but one has {max(threads)} threads. Use --nthreads 1."
            )
        with parallel_config(backend="dask"):
            yield len(threads)
