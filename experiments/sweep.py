"""Train several methods with several seeds, in parallel processes on this machine.

python experiments/sweep.py --methods ls uw go4align+pcgrad --seeds 0 1 2 --jobs 2 train.epochs=5
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from joblib import Parallel, delayed
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.config import build_balancer
from balance.tracking import connect
from experiments import experiment as experiments
from experiments import trainer

if TYPE_CHECKING:
    from collections.abc import Sequence


class Outcome(NamedTuple):
    """What came of one run: its test metrics, or why there are none."""

    arguments: list[str]
    metrics: dict[str, float]
    error: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 if all runs finished, 1 if some failed, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--experiment", default="digits", metavar="NAME")
    parser.add_argument("--methods", nargs="+", required=True, metavar="LOSS[+GRADIENT]", help="such as ls go4align+pcgrad")
    parser.add_argument("--seeds", nargs="+", default=["0"], metavar="N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: number of cores)")
    # key=value words may stand anywhere; argparse alone would take them for further methods
    options, overrides = parser.parse_args(_without_overrides(arguments)), _overrides(arguments)
    commands = [
        [f"--experiment={options.experiment}", *_method(method), f"--seed={seed}", *overrides]
        for method in options.methods
        for seed in options.seeds
    ]
    try:
        outcomes = run_all(commands, options.jobs)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    failed = [outcome for outcome in outcomes if outcome.error]
    print(f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed")
    return 1 if failed else 0


def run_all(commands: list[list[str]], jobs: int) -> list[Outcome]:
    """Run the trainer once for each list of arguments; a failure stops no other run.

    Raises:
        ValueError: If any command is mistaken; then nothing has run.
        OSError: If the tracking store cannot be used.
    """
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, but got {jobs}.")
    parser = trainer.build_parser()
    configs = [trainer.configure(parser.parse_intermixed_args(command)) for command in commands]
    for config in configs:
        build_balancer(config, experiments.find(config.experiment).TASKS)
    if configs and configs[0].track:  # once, before several processes would create the database together
        connect(f"balance/{configs[0].experiment}", configs[0].output_dir)
    outcomes = Parallel(n_jobs=jobs, return_as="generator")(delayed(run_one)(command, jobs) for command in commands)
    finished = []
    for outcome in outcomes:
        finished.append(outcome)
        result = outcome.error or "  ".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items())
        print(f"[{len(finished)}/{len(commands)}] {' '.join(outcome.arguments)}: {result}", flush=True)
    return finished


def run_one(command: list[str], jobs: int) -> Outcome:
    """One quiet run of the trainer, with its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    try:
        config = trainer.configure(trainer.build_parser().parse_intermixed_args(command))
        return Outcome(command, trainer.train(trainer.prepare(config, Console(quiet=True))), None)
    except Exception as error:  # noqa: BLE001 - whatever ends one run must not end the others
        return Outcome(command, {}, f"{type(error).__name__}: {error}")


def _method(method: str) -> list[str]:
    loss, _, gradient = method.partition("+")
    return [f"--loss_method={loss}", *([f"--gradient_method={gradient}"] if gradient else [])]


def _overrides(arguments: Sequence[str] | None) -> list[str]:
    words = sys.argv[1:] if arguments is None else arguments
    return [word for word in words if "=" in word and not word.startswith("-")]


def _without_overrides(arguments: Sequence[str] | None) -> list[str]:
    overrides = _overrides(arguments)
    return [word for word in (sys.argv[1:] if arguments is None else arguments) if word not in overrides]


if __name__ == "__main__":
    sys.exit(main())
