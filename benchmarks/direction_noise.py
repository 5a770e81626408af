"""Agreement of the directions that a rule computes on different batches, with one network.

    python benchmarks/direction_noise.py [--experiment quantum_chemistry] [--epochs 4] [--batches 20] [--rules none pcgrad imtl]

A network is trained with equal weights for some epochs. Then every rule computes its direction on the same batches, and nothing
is trained. If the directions of two batches hardly agree, a rule follows the noise of its batches. This prints a table and
records nothing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import TYPE_CHECKING

import torch
from record import FOLDER

sys.path.insert(0, str(FOLDER.parent))

from balance import Balancer
from experiments.config.layers import configure
from experiments.training import threads
from experiments.training.run import build
from experiments.training.step import build_optimizer, train_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.problems.base import Batch
    from experiments.training.run import Run


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    threads.use(1)
    run = build(configure([f"experiment={options.experiment}", "track=false", *options.overrides]))
    optimizer = build_optimizer(run)
    for _ in range(options.epochs):
        for batch in run.batches:
            train_step(run, optimizer, batch)
    batches = list(itertools.islice(run.batches, options.batches))
    print("| rule | mean cosine between the directions of two batches | share of negative weights |\n| --- | ---: | ---: |")
    for name in options.rules:
        directions, weights = directions_of(run, name, batches)
        negative = "-" if weights is None else f"{(weights < 0).float().mean():.2f}"
        print(f"| {name} | {agreement(directions):.2f} | {negative} |", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="quantum_chemistry")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rules", nargs="+", default=["none", "pcgrad", "nashmtl", "imtl", "mgda"])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    return parser


def directions_of(run: Run, name: str, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Directions of length 1 on the trunk by batch, shape (B, P), and the weights of the rule, shape (B, K), if it has any."""
    balancer = Balancer(run.problem.TASKS, gradient=None if name == "none" else name)
    shared = list(run.model.trunk.parameters())
    directions, weights = [], []
    for batch in batches:
        run.model.zero_grad()
        report = balancer.backward(run.problem.losses(run.model(batch[0]), batch), shared=shared)
        direction = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in shared])
        directions.append(direction / direction.norm())
        weights.append(report.gradient_weights)
    known = [row for row in weights if row is not None]
    return torch.stack(directions), torch.stack(known) if known else None


def agreement(directions: torch.Tensor) -> float:
    """Mean cosine over all pairs of rows of length 1, shape (B, P)."""
    cosines = directions @ directions.T
    return float(cosines[~torch.eye(len(directions), dtype=torch.bool)].mean())


if __name__ == "__main__":
    main()
