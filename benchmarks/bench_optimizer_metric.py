"""Conflicts that remain after the optimizer's step, with Gramians in the usual metric and in the metric of the optimizer.

python benchmarks/bench_optimizer_metric.py [--seeds 0 1 2] [--methods mgda] [--steps 250] [--output benchmarks/results]

It prints the share of steps that raise a loss of their batch to first order, by the direction and by the optimizer's step. The
step is the direction divided by the optimizer's diagonal, and momentum. It also prints the test metrics after the last step.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

import record
import torch
from rich.console import Console

from experiments.config.layers import configure
from experiments.training.data import to_device
from experiments.training.evaluation import evaluate
from experiments.training.run import build
from experiments.training.step import build_optimizer, compute_losses, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from experiments.problems.base import Batch
    from experiments.training.run import Run

PROBLEMS = {
    "digits": [],
    "multimnist": [],
    "quantum_chemistry": [],
}
METHODS = ("mgda", "nashmtl")  # without conflict in the usual metric
OPTIMIZERS = {"Adam": [], "Adam without momentum": ["optimizer.betas=[0.0,0.999]"]}
SKIPPED, TOLERANCE = 20, 1e-4  # first steps, in which the diagonal is hardly known; cosine that counts as a rise


class Counts(NamedTuple):
    """Shares of steps that raise some loss to first order, and the final test metrics.

    Attributes:
        direction: Along the negative direction.
        step: Along the step of the optimizer.
        metrics: Test metrics by name.
    """

    direction: float
    step: float
    metrics: dict[str, float]


def measure(problem: str, method: str, optimizer: str, metric: str, seed: int, steps: int) -> Counts:
    """Train, and count conflicts."""
    words = [f"experiment={problem}", f"seed={seed}", "track=false", *PROBLEMS[problem], *OPTIMIZERS[optimizer]]
    words += [f"gradient_method={method}", f"balancer.metric={metric}"]
    with tempfile.TemporaryDirectory() as folder:
        run = build(configure([*words, f"output_dir={folder}"]), Console(quiet=True))
        rule = build_optimizer(run)
        run.model.train()
        raised = [count(run, rule, to_device(batch, "cpu")) for batch in itertools.islice(endless(run), steps)]
        metrics = evaluate(run, run.data.test)
    later = raised[SKIPPED:]
    return Counts(mean(before for before, _ in later), mean(after for _, after in later), metrics)


def endless(run: Run) -> Iterator[Batch]:
    """Yield training batches, epoch after epoch; the balancer closes each epoch."""
    while True:
        yield from run.batches
        run.balancer.end_epoch()


def count(run: Run, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[bool, bool]:
    """Make one step; return whether the negative direction, and the optimizer's step, raise a loss of the batch."""
    shared = list(run.model.trunk.parameters())
    state = torch.get_rng_state()
    rows = jacobian(list(compute_losses(run, batch)[1].values()), shared)
    torch.set_rng_state(state)  # the step drops the same units
    before = flat(shared)
    train_step(run, optimizer, batch)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    return rises(rows, -flat(gradients)), rises(rows, flat(shared) - before)


def jacobian(losses: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """Return the task gradients as rows."""
    rows = [torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True) for loss in losses]
    return torch.stack(
        [flat([torch.zeros_like(p) if g is None else g for g, p in zip(row, shared, strict=True)]) for row in rows]
    )


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one vector, detached, float64."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def rises(rows: Tensor, move: Tensor) -> bool:
    """Return whether a move raises some loss to first order."""
    cosines = (rows @ move) / (rows.norm(dim=1) * move.norm()).clamp(min=1e-300)
    return bool((cosines > TOLERANCE).any())


def main() -> None:
    """Measure, print a table and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--output", type=Path, help="folder for the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for problem, optimizer, method in itertools.product(arguments.problems, OPTIMIZERS, arguments.methods):
        for metric in ("gradients", "optimizer"):
            runs = [measure(problem, method, optimizer, metric, seed, arguments.steps) for seed in arguments.seeds]
            row: dict[str, object] = {"problem": problem, "optimizer": optimizer, "method": method, "metric": metric}
            row |= {"direction": mean(run.direction for run in runs), "step": mean(run.step for run in runs)}
            row["steps"] = [run.step for run in runs]
            row["metrics"] = {name: [run.metrics[name] for run in runs] for name in runs[0].metrics}
            rows.append(row)
            metrics = ", ".join(f"{name} {mean(run.metrics[name] for run in runs):.4g}" for name in runs[0].metrics)
            shares = f"raised by the direction {row['direction']:6.1%}, by the step {row['step']:6.1%}"
            print(f"{problem:18s} {optimizer:22s} {method:8s} {metric:10s} {shares}; {metrics}", flush=True)
    if arguments.output is not None:
        record.write({"Raised losses": rows}, "optimizer_metric", arguments.output)


if __name__ == "__main__":
    main()
