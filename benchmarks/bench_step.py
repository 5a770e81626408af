"""A whole step of the stage beside ``losses.sum().backward()`` and beside TorchJD, in one run, one thread.

    python benchmarks/bench_step.py [--repeats 15]

Every cell is the median over repeats of the time of one forward pass and one backward, relative to that of the plain sum. The
variants take turns, so that a slow moment of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from record import FOLDER, write
from torch import nn

from balance import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable


class Network(nn.Module):
    """A convolutional trunk of 25 000 or a fully connected one of 1.6 million parameters, with K linear heads."""

    def __init__(self, num_tasks: int, large: bool) -> None:  # noqa: FBT001
        super().__init__()
        if large:
            layers = [nn.Linear(256, 512), nn.ReLU(), *(m for _ in range(5) for m in (nn.Linear(512, 512), nn.ReLU()))]
            self.trunk, self.x = nn.Sequential(*layers), torch.randn(128, 256)
            self.heads = nn.ModuleList(nn.Linear(512, 8) for _ in range(num_tasks))
        else:
            convolutions = [
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
            ]
            self.trunk = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 64), nn.ReLU())
            self.x = torch.randn(64, 1, 12, 12)
            self.heads = nn.ModuleList(nn.Linear(64, 8) for _ in range(num_tasks))

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = self.trunk(self.x)
        return features, [head(features).square().mean() + k for k, head in enumerate(self.heads)]


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
    return steps | peers(network)


def peers(network: Network) -> dict[str, Callable[[], object]]:
    try:
        from torchjd.aggregation import MGDA, PCGrad  # noqa: PLC0415
        from torchjd.autojac import jac_to_grad, mtl_backward  # noqa: PLC0415
    except ImportError:
        print("torchjd is not installed, so it is left out: make benchmark installs it", file=sys.stderr)
        return {}

    def step(aggregator: nn.Module) -> Callable[[], object]:
        def run() -> None:
            features, losses = network()
            mtl_backward(losses, features=features)
            jac_to_grad(network.trunk.parameters(), aggregator)

        return run

    return {"torchjd mgda": step(MGDA()), "torchjd pcgrad": step(PCGrad())}


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
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for large in (False, True):
        for num_tasks in (3, 11):
            torch.manual_seed(0)
            network = Network(num_tasks, large)
            P = sum(p.numel() for p in network.trunk.parameters())
            rows = measure(variants(network, num_tasks), network, options.repeats)
            results[f"K={num_tasks} P={P}"] = rows
            print(f"\nK = {num_tasks}, P = {P}")
            for name, row in rows.items():
                print(f"  {name:26s} {row['ms']:9.2f} ms  {row['ratio']:6.2f} x  (quartiles {row['spread_ms']:.2f} ms apart)")
    write(results, "step", options.output)


if __name__ == "__main__":
    main()
