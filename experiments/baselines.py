"""Measure an experiment's single-task baselines: the trainer with --loss_method=stl, once for each task and seed.

python experiments/baselines.py --experiment=digits --seeds 0 1 2 --output experiments/digits/baselines.yaml
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from experiments import experiment as experiments
from experiments.sweep import run_all

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 if all runs finished, 1 if some failed, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--experiment", default="digits", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: number of cores)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="YAML file to write")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="for every run, such as train.epochs=3")
    options = parser.parse_args(arguments)
    try:
        tasks = experiments.find(options.experiment).TASKS
        options.output.touch()  # a file that cannot be written costs no run
        outcomes = run_all(
            [
                [
                    f"--experiment={options.experiment}",
                    "--loss_method=stl",
                    f"--seed={seed}",
                    f"loss.main_task={k}",
                    *options.overrides,
                ]
                for k in range(len(tasks))
                for seed in options.seeds
            ],
            options.jobs,
        )
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if any(outcome.error for outcome in outcomes):
        return 1
    values: dict[str, list[float]] = {}
    for number, outcome in enumerate(outcomes):
        task = tasks[number // len(options.seeds)]
        for name, value in outcome.metrics.items():
            if name.partition("/")[0] == task:
                values.setdefault(name, []).append(round(value, 6))
    command = f"python experiments/baselines.py --experiment={options.experiment} --seeds {' '.join(options.seeds)}"
    command += f" --output {options.output}" + (f" --overrides {' '.join(options.overrides)}" if options.overrides else "")
    rows = {name: {"mean": round(statistics.fmean(runs), 6), "runs": runs} for name, runs in values.items()}
    text = yaml.safe_dump({"command": command, "metrics": rows}, sort_keys=False, default_flow_style=None, width=120)
    options.output.write_text("# Test metrics of networks trained on one task alone\n" + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
