"""Time of a step with one loss per sample, relative to the backward pass of the mean loss and next to TorchJD, on one thread.

    python benchmarks/bench_per_sample.py [--repeats 15] [--networks linear convolutional] [--samples 16 64 256]

A step is one forward pass, and backward passes for the direction of MGDA over all samples of the batch. Every cell is a median,
relative to the median of the plain step in the same run.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peers import installed, sample_gramian_step
from record import FOLDER, write
from timing import summaries, times_in_turns
from torch import nn
from torch.nn import functional

from balance import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = "losses.mean().backward()"
CLASSES = 10


def linear() -> tuple[nn.Module, tuple[int, ...]]:
    """Build 3 layers of 128; 22 000 parameters."""
    layers = [nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers), (32,)


def convolutional() -> tuple[nn.Module, tuple[int, ...]]:
    """Build 3 convolutions on images of 32 x 32 and a linear layer; 33 000 parameters."""
    layers = [
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, CLASSES)),
    ]
    return nn.Sequential(*layers), (3, 32, 32)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {"linear": linear, "convolutional": convolutional}


def variants(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return steps by name."""
    balancer, shared = Balancer(None, gradient="mgda"), list(network.parameters())

    def losses(model: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(model(x), y, reduction="none")

    steps: dict[str, Callable[[], object]] = {
        PLAIN: lambda: losses(network).mean().backward(),
        "balance mgda": lambda: balancer.backward(losses(network), shared=shared),
    }
    if installed():
        steps["torchjd mgda"] = sample_gramian_step(copy.deepcopy(network), losses, "MGDA")
    return steps


def measure(name: str, num_samples: int, repeats: int) -> tuple[str, dict[str, dict[str, Any]]]:
    """Time all steps of a network, and return a title and rows by step."""
    torch.manual_seed(0)
    network, shape = NETWORKS[name]()
    x, y = torch.randn(num_samples, *shape), torch.randint(CLASSES, (num_samples,))
    times = times_in_turns(variants(network, x, y), network.zero_grad, warm_up=2, repeats=repeats, budget=math.inf)
    return f"{name} K={num_samples} P={sum(p.numel() for p in network.parameters())}", summaries(times, PLAIN)


def main() -> None:
    """Measure all networks, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["linear", "convolutional"])
    parser.add_argument("--samples", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.networks:
        for num_samples in options.samples:
            title, rows = measure(name, num_samples, options.repeats)
            results[title] = rows
            print(f"\n{title}")
            for label, row in rows.items():
                print(f"  {label:26s} {row['ms']:9.2f} ms  {row['ratio']:6.2f} x  (quartiles {row['spread_ms']:.2f} ms apart)")
    write(results, "per_sample", options.output)


if __name__ == "__main__":
    main()
