"""Run a grid of loss balancers x gradient balancers x seeds, in parallel, and go on where an earlier sweep was cut off.

python experiments/sweep.py --experiment=digits --loss_method=ls,uw --gradient_method=none,pcgrad --seeds=3 train.epochs=5
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.config import build_balancer
from balance.tracking import Tracker
from experiments.analysis import baselines as reference
from experiments.cli import add_methods, add_output, add_overrides, all_overrides, command_parser, parse_seeds
from experiments.config.layers import configure, values_by_key
from experiments.config.schema import RunConfig
from experiments.problems import base as experiments
from experiments.recording.recorded_run import METHOD_GROUPS
from experiments.recording.store import Store, common_of, digest, fingerprint
from experiments.sweeps import backends as cluster
from experiments.sweeps import runtime as estimate
from experiments.training.console import metrics_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from omegaconf import DictConfig

    from experiments.recording.recorded_run import RecordedRun

ROOT = str(Path(__file__).resolve().parents[1])
BACKENDS = ("loky", "ray", "dask")
GRID = {"loss_method": "--loss_method", "gradient_method": "--gradient_method", "seed": "--seeds"}
START = 10  # seconds until a worker process has imported what it needs, about


@dataclass(frozen=True)
class Job:
    """One run of the trainer that a plan asks for."""

    arguments: tuple[str, ...]
    config: DictConfig
    fingerprint: str
    finished: bool = False

    @property
    def baseline(self) -> bool:
        """Whether it trains one task alone."""
        return bool(self.config.loss_method == "stl")

    @property
    def label(self) -> str:
        """Methods, as a table calls them; the task of a single-task network."""
        config = self.config
        if self.baseline:
            return f"stl {experiments.find(config.experiment).TASKS[config.loss.main_task]}"
        return " + ".join(filter(None, (config.loss_method, config.gradient_method)))

    def known(self, finished: Collection[str]) -> Job:
        """The same job, with what the store knows of it."""
        return replace(self, finished=self.fingerprint in finished)


class Outcome(NamedTuple):
    """What came of one run: its test metrics, or why there are none."""

    metrics: dict[str, float]
    error: str | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 if all runs finished, 1 if some failed, 2 for a mistake in the command, 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    console = Console(soft_wrap=True)
    with ExitStack() as stack:
        try:
            jobs = plan(options)
            workers = options.jobs or os.cpu_count() or 1
            if options.backend != "loky" and not options.dry_run:
                there = stack.enter_context(cluster.connected(options.backend, options.cluster))
                workers = options.jobs or there
        except (ValueError, TypeError, OSError, ImportError) as error:
            parser.error(str(error))
        try:
            show_plan(jobs, workers, console)
            return 0 if options.dry_run else carry_out(jobs, workers, options.backend, console)
        except KeyboardInterrupt:
            console.print("Interrupted. The same command goes on from here.")
            return 130


def carry_out(jobs: Sequence[Job], workers: int, backend: str, console: Console) -> int:
    """Run the plan and tell what came of it; the exit code."""
    try:
        outcomes = run_all(jobs, workers, backend, console)
    except TerminatedWorkerError:
        console.print(
            "A worker process died; was there too little memory? The same command goes on from here, --jobs=1 uses less."
        )
        return 1
    failed = [(job, outcome) for job, outcome in outcomes if outcome.error]
    console.print(
        f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed, {sum(job.finished for job in jobs)} were there"
    )
    for job, outcome in failed:
        console.print(f"failed: {' '.join(job.arguments)}\n        {outcome.error}", style="red", markup=False)
    config = jobs[0].config
    console.print(f"Next: python experiments/compare.py --experiment={config.experiment} --output_dir={config.output_dir}")
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    """Lists of methods and seeds; everything else is as for the trainer."""
    parser = command_parser(__doc__)
    add_output(parser)
    add_methods(parser, several=True)
    parser.add_argument("--seeds", default="1", metavar="N", help="how many, such as 3 for 0, 1, 2, or which: 4,7 (default: 1)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: number of cores, of the cluster if one is used)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="loky", help="joblib's: processes here (loky), or a cluster")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="of a running ray or dask cluster (default: as its environment says)"
    )
    parser.add_argument(
        "--no_baselines", action="store_true", help="no single-task networks; compare.py then needs --baselines=none"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the plan and the time that it will take, and run nothing")
    add_overrides(parser, "for every run, any entry of the trainer's configuration, such as train.epochs=3")
    return parser


def plan(options: argparse.Namespace) -> list[Job]:
    """The runs that the command asks for, single-task baselines first where there are none for these settings.

    Raises:
        ValueError: If any run is mistaken; nothing has run then.
        OSError: If the tracking store cannot be used.
    """
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, but got {options.jobs}.")
    if options.cluster and options.backend == "loky":
        raise ValueError("--cluster needs --backend=ray or --backend=dask.")
    for key in values_by_key(options.overrides).keys() & GRID:
        raise ValueError(f"A sweep has lists of those: use {GRID[key]} in place of {key}=....")
    seeds = parse_seeds(options.seeds)
    losses, gradients = _names(options.loss_method, "ls"), _names(options.gradient_method, "none")
    common = all_overrides(argparse.Namespace(**vars(options) | {"loss_method": None, "gradient_method": None}))
    grid = [
        _job([f"--loss_method={loss}", f"--gradient_method={gradient}", f"--seed={seed}", *common])
        for loss, gradient, seed in itertools.product(losses, gradients, seeds)
    ]
    config = grid[0].config
    runs = recorded(config, create=not options.dry_run)
    known = reference.with_settings(config.experiment, common_of(config), ()) is not None
    baselines = [] if known or options.no_baselines else baseline_jobs(common, seeds)
    finished = {run.fingerprint for run in runs if run.finished}
    jobs = {job.fingerprint: job for job in (*baselines, *grid)}  # a baseline may be in the grid too
    return [job.known(finished) for job in jobs.values()]


def recorded(config: DictConfig, *, create: bool) -> list[RecordedRun]:
    """Runs that have ended, newest first; none without tracking.

    Raises:
        OSError: If the tracking store cannot be used.
    """
    try:
        return Store(config.experiment, config.output_dir, create=create).runs() if config.track else []
    except FileNotFoundError:
        return []


def baseline_jobs(overrides: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """One single-task run for each task and seed, with the overrides that do not belong to the methods."""
    common = [override for override in overrides if not override.startswith(METHOD_GROUPS)]
    name = values_by_key(overrides).get("experiment", RunConfig.experiment)
    tasks = range(len(experiments.find(name).TASKS))
    return [
        _job(["--loss_method=stl", f"loss.main_task={k}", f"--seed={seed}", *common])
        for k, seed in itertools.product(tasks, seeds)
    ]


def show_plan(jobs: Sequence[Job], workers: int, console: Console) -> None:
    """Print what will run, and how long it will take."""
    seconds = estimate.seconds_of([job.config for job in jobs if not job.finished], workers)
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        rows.setdefault(job.label, []).append(job)
    table = Table("methods", "seeds", "to run", "finished", "time of a run", title=f"sweep of {jobs[0].config.experiment}")
    for label, of_row in rows.items():
        known = [seconds[job.fingerprint] for job in of_row if not job.finished]
        seeds = ", ".join(str(job.config.seed) for job in of_row)
        each = "-" if not known or math.isnan(known[0]) else _spelled(known[0])
        table.add_row(label, seeds, str(len(known)), str(len(of_row) - len(known)), each)
    console.print(table)
    for note in _warnings(jobs):
        console.print(f"note: {note}", markup=False)
    known_seconds = [number for number in seconds.values() if not math.isnan(number)]
    total = sum(known_seconds) / min(workers, max(len(seconds), 1)) + (START if seconds else 0)
    done = len(jobs) - len(seconds)
    console.print(f"{len(seconds)} runs to do, {done} are finished already; about {_spelled(total)} with {workers} at a time")


def run_all(jobs: Sequence[Job], workers: int, backend: str, console: Console) -> list[tuple[Job, Outcome]]:
    """Run what is not finished; a failure stops no other run.

    Args:
        jobs: The plan.
        workers: Runs at a time.
        backend: Name of joblib's backend, which is set up.
        console: Where to print.
    """
    todo = [job for job in jobs if not job.finished]
    if not todo:
        return []
    with sweep_run(jobs) as tracker:
        threads = max(1, (os.cpu_count() or 1) // workers) if backend == "loky" else 1
        environment = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
        owner = os.getpid() if backend == "loky" and workers > 1 else None
        calls = (
            delayed(run_one)(
                k, job.arguments, threads, tracker.run_id, environment, str(Path(__file__).resolve().parents[1]), owner
            )
            for k, job in enumerate(todo)
        )
        outcomes = []
        try:
            for k, outcome in _progress(_parallel(calls, workers, backend), len(todo), console):
                outcomes.append((todo[k], Outcome(*outcome)))
                console.print(_told(*outcomes[-1]), markup=False)
        finally:
            if tracker.run_id is not None:
                store_of(jobs).close_children(tracker.run_id)
        failed = sum(outcome.error is not None for _, outcome in outcomes)
        tracker.log_metrics({"runs/finished": len(outcomes) - failed, "runs/failed": failed}, 0)
        if failed:
            tracker.status = "FAILED"
    return outcomes


def sweep_run(jobs: Sequence[Job]) -> Tracker:
    """The MLflow run under which those of the sweep are shown; an earlier sweep with the same plan is continued."""
    config = jobs[0].config
    name = digest(sorted(job.fingerprint for job in jobs if not job.baseline))
    earlier = None
    if config.track:
        earlier = store_of(jobs).sweep(name)
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
    """Where the runs of a plan are recorded."""
    return Store(jobs[0].config.experiment, jobs[0].config.output_dir)


def run_one(
    number: int,
    arguments: Sequence[str],
    threads: int,
    parent: str | None,
    environment: dict[str, str],
    root: str,
    owner: int | None,
) -> tuple[int, tuple[dict[str, float], str | None, float]]:
    """One quiet run of the trainer in whatever process joblib chose; it may be on another machine.

    Args:
        number: Which run of the plan, as runs end in any order.
        arguments: Of the trainer.
        threads: How many the run may use.
        parent: Id of the sweep's MLflow run.
        environment: Variables that MLflow needs.
        root: Folder of the project.
        owner: Process without which this one has no business; None if it need not look.

    Returns:
        The number, and the fields of an `Outcome`.
    """
    import os  # noqa: PLC0415 - the function travels alone
    import sys  # noqa: PLC0415
    import threading  # noqa: PLC0415
    import time  # noqa: PLC0415
    import warnings  # noqa: PLC0415

    def leave_with_owner() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    if owner is not None and all(thread.name != "owner" for thread in threading.enumerate()):
        threading.Thread(target=leave_with_owner, name="owner", daemon=True).start()
    start = time.perf_counter()
    os.environ.update(environment)
    if root not in sys.path:
        sys.path.insert(0, root)
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        from rich.console import Console  # noqa: PLC0415

        from experiments.config.layers import configure  # noqa: PLC0415
        from experiments.training.loop import train  # noqa: PLC0415
        from experiments.training.run import prepare  # noqa: PLC0415

        config = configure([word.removeprefix("--") for word in arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the plan has told them
            run = prepare(config, Console(quiet=True))
        metrics = train(run, parent)
    except Exception as error:  # noqa: BLE001 - whatever ends one run must not end the others
        return number, ({}, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)  # with one run at a time this is the user's own process
    return number, (metrics, None, time.perf_counter() - start)


def _told(job: Job, outcome: Outcome) -> str:
    """Label and result; of a single-task network, that of its task."""
    tasks = experiments.find(job.config.experiment).TASKS
    trained = (tasks[job.config.loss.main_task],) if job.baseline else tasks
    result = metrics_line({name: value for name, value in outcome.metrics.items() if name.partition("/")[0] in trained})
    return f"{job.label}, seed {job.config.seed}: {outcome.error or result} ({outcome.seconds:.0f} s)"


def _parallel(calls: Iterable[Any], workers: int, backend: str) -> Iterator[Any]:
    """What the calls return, in the order in which they end."""
    if backend == "ray":  # its backend gives the results at the end only, but prints how far it is
        yield from Parallel(n_jobs=workers, verbose=10)(calls)
    else:
        yield from Parallel(n_jobs=workers, return_as="generator_unordered")(calls)


def _progress(outcomes: Iterable[Any], total: int, console: Console) -> Iterator[Any]:
    columns = (TextColumn("runs"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(outcomes, total=total)


def _job(arguments: list[str]) -> Job:
    config = configure([word.removeprefix("--") for word in arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # _warnings tells them once
        build_balancer(config, experiments.find(config.experiment).TASKS)
    folder = Path(config.output_dir).expanduser().resolve()  # workers may be in other directories
    return Job((*arguments, f"output_dir={folder}"), config, fingerprint(config))


def _warnings(jobs: Sequence[Job]) -> list[str]:
    """What the stage has to say of the pairings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for job in {job.label: job for job in jobs}.values():
            build_balancer(job.config, experiments.find(job.config.experiment).TASKS)
    return list(dict.fromkeys(str(warning.message) for warning in caught))


def _names(words: str | None, default: str) -> list[str]:
    names = [name.strip() for name in (words or default).split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"A list of methods must name each once, separated by commas, but got '{words}'.")
    return names


def _spelled(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
