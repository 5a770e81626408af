"""A whole step of the stage beside ``losses.sum().backward()`` and beside TorchJD, in one run, one thread.

    python benchmarks/bench_step.py [--repeats 15] [--networks mlp convolutional] [--tasks 3 11]

Every cell is the median over repeats of the time of one forward pass and one backward, relative to that of the plain sum. The
variants take turns, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from networks import NETWORKS, Network
from peers import installed, jacobian_step
from record import FOLDER, write

from balance import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable


def variants(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        torch.stack(network()[1]).sum().backward()

    def stage(loss: str, gradient: str | None, source: str = "parameters") -> Callable[[], object]:
        balancer = Balancer(num_tasks, loss=loss, gradient=gradient, source=source)

        def step() -> None:
            features, losses = network()
            losses_by_task = dict(zip(balancer.tasks, losses, strict=True))
            balancer.backward(losses_by_task, shared=network.trunk.parameters(), features=features)

        return step

    steps = {
        "losses.sum().backward()": plain,
        "ls": stage("ls", None),
        "go4align": stage("go4align", None),
        "famo": stage("famo", None),
        "mgda": stage("ls", "mgda"),
        "pcgrad": stage("ls", "pcgrad"),
        "go4align + pcgrad": stage("go4align", "pcgrad"),
        "mgda on features": stage("ls", "mgda", "features"),
        "pcgrad on features": stage("ls", "pcgrad", "features"),
    }
    if installed():
        steps["torchjd mgda"] = jacobian_step(network, "MGDA")
        steps["torchjd pcgrad"] = jacobian_step(network, "PCGrad")
    return steps


def measure(steps: dict[str, Callable[[], object]], network: Network, repeats: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            network.zero_grad()
            start = time.perf_counter()
            step()
            if turn >= 2:  # warmed up
                times[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times["losses.sum().backward()"])
    return {
        name: {
            "ms": round(statistics.median(t), 3),
            "ratio": round(statistics.median(t) / base, 2),
            "spread_ms": round(statistics.quantiles(t, n=4)[2] - statistics.quantiles(t, n=4)[0], 3),
        }
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "convolutional"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 11])
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        for num_tasks in options.tasks:
            torch.manual_seed(0)
            network = NETWORKS[name](num_tasks)
            P = sum(p.numel() for p in network.trunk.parameters())
            rows = measure(variants(network, num_tasks), network, options.repeats)
            results[f"{name} K={num_tasks} P={P}"] = rows
            print(f"\n{name}, K = {num_tasks}, P = {P}")
            for variant, row in rows.items():
                print(
                    f"  {variant:26s} {row['ms']:9.2f} ms  {row['ratio']:6.2f} x  (quartiles {row['spread_ms']:.2f} ms apart)"
                )
    write(results, "step", options.output)


if __name__ == "__main__":
    main()
