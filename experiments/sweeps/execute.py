"""The runs of a plan, in parallel; a failure stops no other run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from balance.comparison.store import Store
from balance.tracking import Tracker
from experiments.config.layers import values_by_key
from experiments.recording.fingerprint import digest
from experiments.sweeps.console import progress, result_line
from experiments.sweeps.worker import WorkerOptions, portable_worker
from experiments.training.threads import share

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from experiments.sweeps.job import Job
    from experiments.sweeps.worker import Outcome

ROOT = str(Path(__file__).resolve().parents[2])


def execute(jobs: Sequence[Job], workers: int, backend: str, console: Console) -> int:
    """Run a plan and print its results.

    Args:
        jobs: The plan.
        workers: Runs at a time.
        backend: Name of joblib's backend, which is connected.
        console: Console for the results.

    Returns:
        The exit code: 0 if all runs finished, else 1.
    """
    try:
        outcomes = run_jobs(jobs, workers, backend, console)
    except TerminatedWorkerError:
        console.print(
            "A worker process died, perhaps for lack of memory. The same command resumes from here; --jobs=1 needs less memory."
        )
        return 1
    finally:
        record_names(jobs)
    failed = [(job, outcome) for job, outcome in outcomes if outcome.error]
    before = sum(job.finished for job in jobs)
    console.print(f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed, {before} were finished before")
    for job, outcome in failed:
        console.print(f"failed: {' '.join(job.overrides)}\n        {outcome.error}", style="red", markup=False)
    console.print(f"Next: {_next_command(jobs)}")
    return 1 if failed else 0


def record_names(jobs: Sequence[Job]) -> None:
    """Tag the recorded runs of named configurations with the names, so that tables show them."""
    names = {job.fingerprint: job.name for job in jobs if job.name}
    if not names or not jobs[0].config.track:
        return
    store = store_of(jobs)
    for run in store.runs():
        if run.configuration != names.get(run.fingerprint, run.configuration):
            store.client.set_tag(run.run_id, "configuration", names[run.fingerprint])


def _next_command(jobs: Sequence[Job]) -> str:
    """Return the command that compares the runs, one table for each value of the first key of the grid."""
    config = jobs[0].config
    keys = list(dict.fromkeys(key for job in jobs for key in values_by_key(job.cell)))
    command = f"python experiments/compare.py --experiment={config.experiment} --output_dir={config.output_dir}"
    return f"{command} --per={keys[0]}" if keys else command


def run_jobs(jobs: Sequence[Job], workers: int, backend: str, console: Console) -> list[tuple[Job, Outcome]]:
    """Run the jobs that are not finished, and return their outcomes in the order of their ends.

    Args:
        jobs: The plan.
        workers: Runs at a time.
        backend: Name of joblib's backend, which is connected.
        console: Console for the results.

    Returns:
        Jobs and outcomes, in the order of their ends.
    """
    unfinished = [job for job in jobs if not job.finished]
    outcomes: list[tuple[Job, Outcome]] = []
    if not unfinished:
        return outcomes
    with sweep_tracker(jobs) as tracker:
        calls = _calls(unfinished, workers, backend, tracker.run_id)
        try:
            for k, outcome in progress(_parallel(calls, workers, backend), len(unfinished), console):
                outcomes.append((unfinished[k], outcome))
                console.print(result_line(unfinished[k], outcome), markup=False)
        finally:
            if tracker.run_id is not None:
                store_of(jobs).close_children(tracker.run_id)
        failed = sum(outcome.error is not None for _, outcome in outcomes)
        tracker.log_metrics({"runs/finished": len(outcomes) - failed, "runs/failed": failed}, 0)
        if failed:
            tracker.status = "FAILED"
    return outcomes


def sweep_tracker(jobs: Sequence[Job]) -> Tracker:
    """Return the MLflow run that groups the runs of the sweep; an earlier sweep with an equal plan is resumed."""
    config = jobs[0].config
    name = digest(sorted(job.fingerprint for job in jobs if not job.is_baseline))
    earlier = store_of(jobs).sweep(name) if config.track else None
    if earlier is not None:
        store_of(jobs).close_children(earlier.info.run_id)
    params = {
        "methods": ", ".join(dict.fromkeys(job.label for job in jobs)),
        "seeds": ", ".join(map(str, sorted({job.config.seed for job in jobs}))),
    }
    return Tracker(
        config.experiment,
        config.output_dir,
        name=time.strftime("sweep-%Y%m%d-%H%M%S"),
        tags={"kind": "sweep", "sweep": name},
        params=params,
        run_id=None if earlier is None else earlier.info.run_id,
        enabled=config.track,
    )


def store_of(jobs: Sequence[Job]) -> Store:
    """Return the store with the runs of a plan."""
    return Store(jobs[0].config.experiment, jobs[0].config.output_dir)


def _calls(jobs: Sequence[Job], workers: int, backend: str, parent: str | None) -> Iterator[Any]:
    """Return joblib's calls for the jobs; each returns the position of the job and its outcome, as runs end in any order."""
    local = backend == "loky"
    options = WorkerOptions(share(workers) if local else 1, parent, os.getpid() if local and workers > 1 else None)
    environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    work = portable_worker(ROOT, environment)
    return (delayed(work)(k, job.overrides, options) for k, job in enumerate(jobs))


def _parallel(calls: Iterable[Any], workers: int, backend: str) -> Iterator[Any]:
    """Return the results of the calls in the order in which they end."""
    if backend == "ray":  # its backend returns all results at the end, but prints its progress
        yield from Parallel(n_jobs=workers, verbose=10)(calls)
    else:
        yield from Parallel(n_jobs=workers, return_as="generator_unordered")(calls)
