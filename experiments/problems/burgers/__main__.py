"""Draw the solutions of runs of the trainer, and their errors.

python -m experiments.problems.burgers runs/burgers/FOLDER runs/burgers/OTHER_FOLDER --output burgers.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf

from experiments.problems.burgers.figure import draw
from experiments.problems.burgers.model import ModelConfig, build_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.problems.base import Network


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 after a drawn figure, 2 for a mistake in the command."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        draw([load_run(folder) for folder in options.folders], options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Saved {options.output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    sentence, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.problems.burgers",
        description=sentence,
        epilog=f"example:\n  {example.strip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="folder of a run, with config.yaml and best.pt")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="figure to write, such as burgers.png")
    return parser


def load_run(folder: Path) -> tuple[str, Network]:
    """Return the methods of a run, and its network.

    Args:
        folder: Folder of the run.

    Raises:
        ValueError: If the run is of another experiment.
        OSError: If a file is missing.
    """
    config = OmegaConf.load(folder / "config.yaml")
    if config.experiment != "burgers":
        raise ValueError(f"Runs must be of the experiment 'burgers', but {folder} is of '{config.experiment}'.")
    network = build_model(ModelConfig(config.model.width, config.model.depth))
    network.load_state_dict(torch.load(folder / "best.pt", map_location="cpu", weights_only=True)["model"])
    return " + ".join(filter(None, (config.loss_method, config.gradient_method))), network


if __name__ == "__main__":
    sys.exit(main())
