"""One run of a sweep in a worker process."""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from experiments.config.layers import configure
from experiments.training import loop, threads
from experiments.training.run import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OWNER_THREAD = "owner"


class Outcome(NamedTuple):
    """Result of a run: its test metrics, or the error that ended it."""

    metrics: dict[str, float]
    error: str | None
    seconds: float


class WorkerOptions(NamedTuple):
    """Options that all runs of a sweep share.

    Attributes:
        threads: Number of threads of a run whose configuration has none.
        parent: Id of the sweep's MLflow run; None without tracking.
        owner: Id of the process with which the worker ends; None for a worker of a cluster, or no separate process.
    """

    threads: int
    parent: str | None
    owner: int | None


def portable_worker(
    root: str, environment: dict[str, str]
) -> Callable[[int, Sequence[str], WorkerOptions], tuple[int, Outcome]]:
    """Return `run_job` for a process that may be on another machine, where the project is not on the path.

    A nested function is serialised by value, so that the worker needs no import before the path is set.

    Args:
        root: Folder of the project.
        environment: Variables that MLflow needs.
    """

    def work(number: int, overrides: Sequence[str], options: WorkerOptions) -> tuple[int, Outcome]:
        import os  # noqa: PLC0415
        import sys  # noqa: PLC0415

        os.environ.update(environment)
        if root not in sys.path:
            sys.path.insert(0, root)
        from experiments.sweeps.worker import run_job  # noqa: PLC0415

        return number, run_job(overrides, options)

    return work


def run_job(overrides: Sequence[str], options: WorkerOptions) -> Outcome:
    """Train once, without output; continue the run if an earlier process has begun it, unless the overrides have resume=false.

    Args:
        overrides: Entries of the trainer's configuration.
        options: Options of the sweep.

    Returns:
        The outcome, with the error message of a failed run.
    """
    if options.owner is not None:
        _end_with(options.owner)
    start = time.perf_counter()
    try:
        with threads.restored():  # with one run at a time this is the user's own process
            metrics = _train(overrides, options)
        return Outcome(metrics, None, time.perf_counter() - start)
    except Exception as error:  # noqa: BLE001 - an error of one run must not end the others
        return Outcome({}, f"{type(error).__name__}: {error}", time.perf_counter() - start)


def _train(overrides: Sequence[str], options: WorkerOptions) -> dict[str, float]:
    """Train once, and return the test metrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the plan has printed them
        config = configure(["resume=true", *overrides])
        threads.use(config.train.threads or options.threads)
        run = prepare(config, Console(quiet=True))
    return loop.train(run, options.parent)


def _end_with(owner: int) -> None:
    """End this process within a second after its owner, by a thread that is started once."""

    def wait() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    if all(thread.name != OWNER_THREAD for thread in threading.enumerate()):
        threading.Thread(target=wait, name=OWNER_THREAD, daemon=True).start()
