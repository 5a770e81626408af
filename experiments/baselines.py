"""Train the single-task networks of an experiment, one for each task and seed, and write their metrics to a file.

python experiments/baselines.py --experiment=digits --seeds=3 --output=experiments/problems/digits/baselines.yaml
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.comparison.store import Store
from experiments.cli import add_output, add_overrides, all_overrides, command_parser, parse_seeds, run_command
from experiments.problems import base as problems
from experiments.sweeps.execute import run_jobs
from experiments.sweeps.plan import baseline_jobs
from experiments.training.threads import runs_at_a_time

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from balance.comparison.recorded_run import RecordedRun
    from experiments.cli import Work
    from experiments.sweeps.job import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all runs finished, 1 if some failed, 2 for a mistake, 130 after Ctrl-C."""
    interrupted = "Interrupted. The same command resumes from here."
    return run_command(build_parser(), arguments, prepare_work, interrupted=interrupted)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with flags for seeds and the file; all other options are entries of the trainer's configuration."""
    parser = command_parser(__doc__)
    add_output(parser)
    parser.add_argument("--seeds", default="3", metavar="N", help="number, such as 3, or list of seeds: 4,7 (default: 3)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores divided by train.threads)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="YAML file to write")
    add_overrides(parser, "for every run, such as train.epochs=3")
    return parser


def prepare_work(options: argparse.Namespace) -> Work:
    """Return the work of the command: to train the planned runs and to write the file.

    Raises:
        ValueError: If an option is wrong.
        OSError: If the file or the tracking store cannot be written.
    """
    jobs = baseline_jobs(all_overrides(options), parse_seeds(options.seeds))
    config = jobs[0].config
    if not config.track:
        raise ValueError("track must be true, but got track=false. Baselines are read from the recorded runs.")
    store = Store(config.experiment, config.output_dir, create=True)
    check_writable(options.output)  # before any run, which would be wasted
    workers = runs_at_a_time([job.config for job in jobs], options.jobs)
    return partial(train_and_write, jobs, workers, store, options)


def check_writable(file: Path) -> None:
    """Check that a file can be written, and leave nothing behind: the runs would read an empty file of baselines.

    Raises:
        OSError: If the file cannot be written.
    """
    new = not file.exists()
    file.touch()
    if new:
        file.unlink()


def train_and_write(jobs: Sequence[Job], workers: int, store: Store, options: argparse.Namespace) -> int:
    """Run the jobs and write their metrics; return the exit code."""
    finished = store.finished()
    outcomes = run_jobs([job.with_state(finished) for job in jobs], workers, "loky", Console(soft_wrap=True))
    if any(outcome.error for _, outcome in outcomes):
        return 1
    fingerprints = {job.fingerprint for job in jobs}
    runs = [run for run in store.runs() if run.finished and run.fingerprint in fingerprints]
    flags = [f"--experiment={store.experiment}", f"--seeds={options.seeds}", *options.overrides]
    command = " ".join(["python experiments/baselines.py", *flags])
    options.output.write_text(file_content(runs, problems.tasks_of(jobs[0].config), command), encoding="utf-8")
    return 0


def file_content(runs: Sequence[RecordedRun], tasks: Sequence[str], command: str) -> str:
    """Return the command, the settings, and for each metric the mean and the value of every seed, as YAML."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        task = tasks[int(run.settings["loss.main_task"])]
        for name in (name for name in run.metrics if name.partition("/")[0] == task):
            values.setdefault(name, {})[run.seed] = round(run.metrics[name], 6)
    order = sorted(values, key=lambda name: tasks.index(name.partition("/")[0]))
    rows = {name: [values[name][seed] for seed in sorted(values[name])] for name in order}
    content = {
        "command": command,
        "settings": dict(runs[0].common),
        "metrics": {name: {"mean": round(statistics.fmean(row), 6), "runs": row} for name, row in rows.items()},
    }
    dumped = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return f"# Test metrics of networks trained on one task only\n{dumped}"


if __name__ == "__main__":
    sys.exit(main())
