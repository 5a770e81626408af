"""Measure an experiment's single-task baselines, one network for each task and seed, and write them to a file.

python experiments/baselines.py --experiment=digits --seeds=3 --output=experiments/digits/baselines.yaml
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from experiments.cli import add_output, add_overrides, all_overrides, command_parser, parse_seeds
from experiments.problems import base as experiments
from experiments.recording.store import Store
from experiments.sweep import baseline_jobs, run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.recording.recorded_run import RecordedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 if all runs finished, 1 if some failed, 2 for a mistake in the command."""
    parser = command_parser(__doc__)
    add_output(parser)
    parser.add_argument("--seeds", default="3", metavar="N", help="how many, such as 3, or which: 4,7 (default: 3)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (default: number of cores)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="YAML file to write")
    add_overrides(parser, "for every run, such as train.epochs=3")
    options = parser.parse_intermixed_args(arguments)
    try:
        jobs = baseline_jobs(all_overrides(options), parse_seeds(options.seeds))
        config = jobs[0].config
        if not config.track:
            raise ValueError("Baselines are read from the recorded runs, but track=false.")
        store = Store(config.experiment, config.output_dir, create=True)
        try_writing(options.output)  # a file that cannot be written costs no run
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))
    finished = store.finished()
    outcomes = run_all([job.known(finished) for job in jobs], options.jobs, "loky", Console(soft_wrap=True))
    if any(outcome.error for _, outcome in outcomes):
        return 1
    wanted = {job.fingerprint for job in jobs}
    runs = [run for run in store.runs() if run.finished and run.fingerprint in wanted]
    command = f"python experiments/baselines.py --experiment={config.experiment} --seeds={options.seeds}"
    options.output.write_text(text(runs, config.experiment, " ".join([command, *options.overrides])), encoding="utf-8")
    return 0


def try_writing(file: Path) -> None:
    """Leaves nothing behind: the runs look for the experiment's own file, and an empty one would be damaged.

    Raises:
        OSError: If it cannot be written.
    """
    new = not file.exists()
    file.touch()
    if new:
        file.unlink()


def text(runs: Sequence[RecordedRun], experiment: str, command: str) -> str:
    """Content of the file: the command, the settings, and for each metric the mean and the value of every seed."""
    tasks = experiments.find(experiment).TASKS
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
    return f"# Test metrics of networks trained on one task alone\n{dumped}"


if __name__ == "__main__":
    sys.exit(main())
