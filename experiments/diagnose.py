"""Diagnose a problem before choosing methods: loss scales, conflicts, cost of each method, methods to compare. Writes nothing.

python experiments/diagnose.py --experiment=digits --seed=0 --batches=16 --steps=50 train.batch_size=32
"""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from experiments.cli import add_overrides, all_overrides, command_parser, run_command
from experiments.config.layers import configure
from experiments.training import threads
from experiments.training.diagnosis import diagnose_network

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from balance import Diagnosis
    from experiments.cli import Work

SWEEP_FLAGS = ("experiment", "loss_method", "gradient_method", "seed")  # entries for which the sweep has flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 with a report, 2 for a mistake in the command, 130 after Ctrl-C."""
    with threads.restored():
        return run_command(build_parser(), arguments, prepare_work)


def prepare_work(options: argparse.Namespace) -> Work:
    """Diagnose, and return the remaining work: to print the report."""
    config = configure(all_overrides(options))
    diagnosis = diagnose_network(config, options.batches, options.steps)
    command = sweep_command(config, diagnosis, options.overrides)
    report = json_report if options.format == "json" else text_report
    return partial(print_report, report(config, diagnosis, command))


def print_report(report: str) -> int:
    """Print a report; return the exit code."""
    print(report)
    return 0


def text_report(config: DictConfig, diagnosis: Diagnosis, command: str) -> str:
    """Return a report for readers."""
    return f"{config.experiment}, seed {config.seed}\n{diagnosis}\n\n{command}"


def json_report(config: DictConfig, diagnosis: Diagnosis, command: str) -> str:
    """Return a report for programs."""
    chosen = {"experiment": config.experiment, "seed": config.seed}
    return json.dumps({**chosen, **diagnosis.as_dict(), "command": command}, indent=2, allow_nan=False)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with the flags of the diagnosis; everything else is an entry of the trainer's configuration."""
    parser = command_parser(__doc__)
    parser.add_argument("--seed", metavar="N", help="seed of the model and of the order of the data (default: 0)")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="number of batches, at least 2 (default: 16)")
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="training steps between the measurements (default: 50)"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the report (default: text)")
    add_overrides(parser, "any entry of the trainer's configuration, such as train.batch_size=32 device=cuda")
    return parser


def sweep_command(config: DictConfig, diagnosis: Diagnosis, overrides: Sequence[str]) -> str:
    """Return the sweep that compares the recommended methods with equal weights and an ordinary backward pass."""
    losses = ",".join(("ls", *diagnosis.loss_methods))
    gradients = ",".join(("none", *diagnosis.gradient_methods))
    flags = [f"--experiment={config.experiment}", f"--loss_method={losses}", f"--gradient_method={gradients}", "--seeds=3"]
    rest = [override for override in overrides if override.partition("=")[0] not in SWEEP_FLAGS]
    return shlex.join(["python", "experiments/sweep.py", *flags, *rest])


if __name__ == "__main__":
    sys.exit(main())
