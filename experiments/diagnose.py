"""Look at an experiment before choosing methods: scales, conflicts, what each method costs, what to compare. Writes nothing.

python experiments/diagnose.py --experiment=digits --seed=0 --batches=16 --steps=50 train.batch_size=32
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance import Diagnosis, diagnose
from experiments import trainer
from experiments.cli import add_overrides, command_line
from experiments.config.schema import configure
from experiments.training.data import brought

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from omegaconf import DictConfig
    from torch import Tensor

    from experiments.problems.base import Batch

CHOSEN = ("experiment", "loss_method", "gradient_method", "seed")  # keys that the sweep has flags for


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 with a report, 2 for a mistake in the command, 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        config = configure(options)
        diagnosis = look(config, options.batches, options.steps)
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    command = sweep_command(config, diagnosis, options.overrides)
    if options.format == "json":
        chosen = {"experiment": config.experiment, "seed": config.seed}
        print(json.dumps({**chosen, **diagnosis.as_dict(), "command": command}, indent=2, allow_nan=False))
    else:
        print(f"{config.experiment}, seed {config.seed}\n{diagnosis}\n\n{command}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Flags of the diagnosis; everything else is a key of the trainer's schema."""
    parser = command_line(__doc__)
    parser.add_argument("--seed", metavar="N", help="seed of the model and of the order of the data (default: 0)")
    parser.add_argument("--batches", type=int, default=16, metavar="N", help="batches to look at, at least 2 (default: 16)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of training between two looks (default: 50)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="what to print (default: text)")
    add_overrides(parser, "any entry of the trainer's configuration, such as train.batch_size=32 device=cuda")
    return parser


def look(config: DictConfig, num_batches: int, steps: int) -> Diagnosis:
    """Diagnose the network with which the trainer would begin, on its first batches.

    Raises:
        ValueError: If a number is out of range, the device is not there, or the data are fewer than two batches.
    """
    run = trainer.build(config)
    batches = (brought(batch, config.device) for batch in run.batches)

    def losses(batch: Batch) -> dict[str, Tensor]:
        return run.experiment.losses(run.model(batch[0]), batch)

    shared = run.model.trunk.parameters()
    return diagnose(losses, batches, model=run.model, shared=shared, num_batches=num_batches, steps=steps, lr=config.train.lr)


def sweep_command(config: DictConfig, diagnosis: Diagnosis, overrides: Sequence[str]) -> str:
    """The sweep that compares what the diagnosis suggests with equal weights and an ordinary backward pass."""
    losses = ",".join(("ls", *diagnosis.loss_methods))
    gradients = ",".join(("none", *diagnosis.gradient_methods))
    flags = [f"--experiment={config.experiment}", f"--loss_method={losses}", f"--gradient_method={gradients}", "--seeds=3"]
    rest = [override for override in overrides if override.partition("=")[0] not in CHOSEN]
    return shlex.join(["python", "experiments/sweep.py", *flags, *rest])


if __name__ == "__main__":
    sys.exit(main())
