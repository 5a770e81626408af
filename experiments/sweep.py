"""Run a grid of loss balancers x gradient balancers x seeds, in parallel; skip finished runs and resume interrupted sweeps.

python experiments/sweep.py --experiment=digits --loss_method=ls,uw --gradient_method=none,pcgrad --seeds=3 train.epochs=5
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from experiments.cli import (
    add_backend,
    add_methods,
    add_output,
    add_overrides,
    all_overrides,
    backend_connected,
    check_backend,
    command_parser,
    parse_seeds,
    requested_workers,
    run_command,
)
from experiments.config.layers import values_by_key
from experiments.sweeps.console import show_plan
from experiments.sweeps.execute import execute
from experiments.sweeps.plan import Configuration, Sweep, plan
from experiments.sweeps.sweep_file import check_overrides, configurations, read_sweep_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.cli import Work
    from experiments.sweeps.job import Job

GRID_FLAGS = {"loss_method": "--loss_method", "gradient_method": "--gradient_method", "seed": "--seeds"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all runs finished, 1 if some failed, 2 for a mistake, 130 after Ctrl-C."""
    parser = build_parser()
    interrupted = "Interrupted. The same command resumes from here."
    return run_command(parser, arguments, partial(prepare_work, parser=parser), interrupted=interrupted)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with lists of methods and seeds; all other options are entries of the trainer's configuration."""
    parser = command_parser(__doc__)
    add_output(parser)
    add_methods(parser, several=True)
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="YAML file with named configurations, in place of experiment and methods"
    )
    parser.add_argument(
        "--seeds", metavar="N", help="number, such as 3 for 0, 1, 2, or list of seeds: 4,7 (default: 1, or as in the file)"
    )
    add_backend(parser)
    parser.add_argument(
        "--no_baselines", action="store_true", help="no single-task networks; compare.py then needs --baselines=none"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the plan and its estimated time, and run nothing")
    add_overrides(parser, "for every run, any entry of the trainer's configuration, such as train.epochs=3")
    return parser


def prepare_work(options: argparse.Namespace, *, parser: argparse.ArgumentParser) -> Work:
    """Plan the runs, and return the work: to print and to run the plan.

    Returns:
        A function that prints the plan and runs it.

    Raises:
        ValueError: If an option is wrong.
        OSError: If the tracking store cannot be used.
    """
    check_backend(options)
    jobs = plan(read_sweep(options), create=not options.dry_run)
    workers = requested_workers(options, [job.config for job in jobs])
    return partial(show_and_execute, jobs, workers, options, parser)


def read_sweep(options: argparse.Namespace) -> Sweep:
    """Return the grid that the options describe.

    Raises:
        ValueError: If an option or the sweep file is wrong.
    """
    for key in values_by_key(options.overrides).keys() & GRID_FLAGS:
        raise ValueError(f"{key} must be a list in a sweep, but got {key}=.... Use {GRID_FLAGS[key]}.")
    return _sweep_of_methods(options) if options.file is None else _sweep_in_file(options)


def _sweep_of_methods(options: argparse.Namespace) -> Sweep:
    losses, gradients = _names(options.loss_method, "ls"), _names(options.gradient_method, "none")
    overrides = all_overrides(argparse.Namespace(**vars(options) | {"loss_method": None, "gradient_method": None}))
    pairs = tuple(itertools.starmap(Configuration, itertools.product(losses, gradients)))
    seeds = parse_seeds(options.seeds or "1")
    return Sweep(pairs, tuple(seeds), tuple(overrides), with_baselines=not options.no_baselines)


def _sweep_in_file(options: argparse.Namespace) -> Sweep:
    for flag in ("experiment", "loss_method", "gradient_method"):
        if getattr(options, flag) is not None:
            raise ValueError(f"--{flag} must not be given with --file, which sets it. Change the file.")
    content = read_sweep_file(options.file)
    overrides = all_overrides(options)
    check_overrides(content, overrides)
    merged = values_by_key([f"experiment={content.experiment}", *content.overrides, *overrides])
    return Sweep(
        tuple(configurations(content)),
        tuple(parse_seeds(options.seeds or content.seeds)),
        tuple(f"{key}={value}" for key, value in merged.items()),
        tuple(itertools.product(*([f"{key}={value}" for value in values] for key, values in content.grid.items()))),
        with_baselines=not options.no_baselines,
    )


def show_and_execute(
    jobs: Sequence[Job], workers: int | None, options: argparse.Namespace, parser: argparse.ArgumentParser
) -> int:
    """Print the plan and, unless it is a dry run, run it; return the exit code."""
    console = Console(soft_wrap=True)
    with backend_connected(options, workers, parser) as number:
        show_plan(jobs, number, console)
        return 0 if options.dry_run else execute(jobs, number, options.backend, console)


def _names(words: str | None, default: str) -> list[str]:
    names = [name.strip() for name in (words or default).split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"A list of methods must contain each name once, separated by commas, but got '{words}'.")
    return names


if __name__ == "__main__":
    sys.exit(main())
