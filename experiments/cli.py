"""What the command lines share: flags for what every run chooses, ``key=value`` for any entry of the configuration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from balance import gradient_balancers, loss_balancers
from experiments.problems import base as experiments

if TYPE_CHECKING:
    from collections.abc import Sequence

FLAGS = ("experiment", "loss_method", "gradient_method", "seed", "output_dir")
METAVAR = "key=value"


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help says in one line what the command does, and ends with the example of the module's docstring."""
    sentence, _, example = (description or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=" ".join(sentence.split()),
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help=f"what is trained: {', '.join(experiments.names())} (default: digits)"
    )
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flag for the folder of the runs."""
    parser.add_argument("--output_dir", metavar="FOLDER", help="where runs are written, MLflow's file included (default: runs)")


def add_methods(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Flags for the two methods, one name each or lists with commas."""
    many = "NAME,NAME,..." if several else "NAME"
    chain = "; several that are applied one after the other: scaleinvls+rlw"
    parser.add_argument("--loss_method", metavar=many, help=f"{', '.join(loss_balancers.names())} (default: ls){chain}")
    parser.add_argument(
        "--gradient_method", metavar=many, help=f"none, {', '.join(gradient_balancers.names())} (default: none)"
    )


def add_overrides(parser: argparse.ArgumentParser, use: str) -> None:
    """The words ``key=value``, which may stand anywhere."""
    parser.add_argument("overrides", nargs="*", metavar=METAVAR, help=use)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Flags that were given, as overrides, before the overrides themselves."""
    given = {flag: getattr(options, flag, None) for flag in FLAGS}
    return [f"{flag}={value}" for flag, value in given.items() if value is not None] + list(options.overrides)


def choices(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides by key.

    Raises:
        ValueError: If one does not read ``key=value``.
    """
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise ValueError(f"Overrides must read key=value, but got '{override}'.")
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def as_recorded(value: str) -> str:
    """A value as MLflow shows it: ``1e-3`` is ``0.001``."""
    return str(OmegaConf.from_dotlist([f"value={value}"]).value)


def seeds_of(words: str) -> list[int]:
    """``3`` is the seeds 0, 1, 2; ``4,7`` are these two.

    Raises:
        ValueError: If the words are neither.
    """
    try:
        numbers = [int(word) for word in words.split(",") if word]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (len(numbers) == 1 and "," not in words and numbers[0] < 1):
        raise ValueError(f"--seeds must be how many, such as 3, or which, such as 4,7, but got '{words}'.")
    seeds = numbers if "," in words else list(range(numbers[0]))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must differ from each other, but got '{words}'.")
    return seeds
