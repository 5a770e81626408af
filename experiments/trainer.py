"""Train one network on the tasks of a problem, with any loss balancer and any gradient balancer.

python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad --seed=0 train.epochs=5 loss.num_groups=3
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.comparison.grouping import method_label
from experiments.cli import add_methods, add_output, add_overrides, all_overrides, command_parser, run_command
from experiments.config.description import table
from experiments.training import ranks, threads
from experiments.training.automatic import configure_automatic
from experiments.training.loop import train
from experiments.training.run import prepare

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from experiments.cli import Work
    from experiments.training.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 after a finished run, 2 for a mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    interrupted = "Interrupted. The run is marked KILLED and keeps everything that was logged. resume=true continues it."
    with ranks.joined(), threads.restored():
        return run_command(build_parser(), arguments, prepare_work, interrupted=interrupted)


def prepare_work(options: argparse.Namespace) -> Work:
    """Return the work of the command: to train, or only to print the configuration."""
    config = configure_automatic(all_overrides(options))
    if options.print_config:
        return partial(print_config, config)
    if options.list_settings:
        return partial(list_settings, config)
    threads.use(config.train.threads)
    console = Console(soft_wrap=True) if ranks.is_first() else Console(quiet=True)
    if config.chosen_by is not None:
        pair = method_label(config.loss_method, config.gradient_method)
        console.print(f"auto chose {pair}, by {config.chosen_by}", markup=False)
    return partial(train_once, prepare(config))


def print_config(config: DictConfig) -> int:
    """Print a configuration as YAML; return the exit code."""
    print(OmegaConf.to_yaml(config), end="")
    return 0


def list_settings(config: DictConfig) -> int:
    """Print all entries of a configuration with value, range and role; return the exit code."""
    Console(width=None if sys.stdout.isatty() else 160).print(table(config))
    return 0


def train_once(run: Run) -> int:
    """Train; return the exit code."""
    train(run)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with flags for the choices of every run; everything else is an entry of the configuration."""
    parser = command_parser(__doc__)
    add_output(parser)
    add_methods(parser, several=False)
    parser.add_argument(
        "--seed", metavar="N", help="seed of the model, of the order of the data and of the balancer (default: 0)"
    )
    parser.add_argument("--print_config", action="store_true", help="print the configuration as YAML, and train nothing")
    parser.add_argument(
        "--list_settings", action="store_true", help="print all entries with value, range and role, and train nothing"
    )
    add_overrides(parser, "any entry of the configuration, such as train.epochs=3 loss.num_groups=2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
