"""Time of a whole step, rule by rule, relative to ``losses.sum().backward()`` and next to TorchJD, on one thread.

    python benchmarks/bench_step.py [--repeats 9] [--networks mlp convolutional] [--tasks 3 11]

A step is one forward pass and one backward pass. Every cell is a median, relative to the median of the plain sum in the same
run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from networks import NETWORKS, Network
from peers import installed, jacobian_step
from record import FOLDER, write
from timing import summaries, times_in_turns

from balance import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = "losses.sum().backward()"
RULES = {  # by label: loss balancer, gradient balancer, source
    "ls": ("ls", None, "parameters"),
    "go4align": ("go4align", None, "parameters"),
    "famo": ("famo", None, "parameters"),
    "mgda": ("ls", "mgda", "parameters"),
    "pcgrad": ("ls", "pcgrad", "parameters"),
    "go4align + pcgrad": ("go4align", "pcgrad", "parameters"),
    "mgda on features": ("ls", "mgda", "features"),
    "pcgrad on features": ("ls", "pcgrad", "features"),
}


def variants(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    """Return steps by name."""

    def plain() -> None:
        torch.stack(network()[1]).sum().backward()

    def stage(loss: str, gradient: str | None, source: Any) -> Callable[[], object]:
        balancer = Balancer(num_tasks, loss=loss, gradient=gradient, source=source)

        def step() -> None:
            features, losses = network()
            losses_by_task = dict(zip(balancer.tasks, losses, strict=True))
            balancer.backward(losses_by_task, shared=network.trunk.parameters(), features=features)

        return step

    steps = {PLAIN: plain, **{label: stage(*rules) for label, rules in RULES.items()}}
    if installed():
        steps["torchjd mgda"] = jacobian_step(network, "MGDA")
        steps["torchjd pcgrad"] = jacobian_step(network, "PCGrad")
    return steps


def measure(name: str, num_tasks: int, repeats: int) -> tuple[str, dict[str, dict[str, Any]]]:
    """Time all steps of a network, and return a title and rows by step."""
    torch.manual_seed(0)
    network = NETWORKS[name](num_tasks)
    steps = variants(network, num_tasks)
    times = times_in_turns(steps, network.zero_grad, warm_up=2, repeats=repeats, budget=math.inf)
    return f"{name} K={num_tasks} P={sum(p.numel() for p in network.trunk.parameters())}", summaries(times, PLAIN)


def main() -> None:
    """Measure all networks, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "convolutional"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 11])
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        for num_tasks in options.tasks:
            title, rows = measure(name, num_tasks, options.repeats)
            results[title] = rows
            print(f"\n{title}")
            for label, row in rows.items():
                print(f"  {label:26s} {row['ms']:9.2f} ms  {row['ratio']:6.2f} x  (quartiles {row['spread_ms']:.2f} ms apart)")
    write(results, "step", options.output)


if __name__ == "__main__":
    main()
