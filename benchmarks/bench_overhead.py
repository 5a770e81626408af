"""Cost of the stage on small networks, where an operation costs more than its numbers, next to a loop by hand and TorchJD.

    python benchmarks/bench_overhead.py [--tasks 4] [--engine-tasks 3 11 40] [--budget 4]

First the rules on the smallest network, then the engines, with IMTL-G, on five small networks. A step is one forward pass and
one backward pass. The clock counts the time of the thread, since other programs disturb such short steps. Every cell is a
median, relative to ``losses.sum().backward()`` in the same run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_jacobian import textbook_loop
from networks import SMALL_NETWORKS, Network
from peers import gramian_step, installed, jacobian_step
from record import FOLDER, write
from timing import summaries, times_in_turns

from balance import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = "losses.sum().backward()"
LOSS_RULES: dict[str, dict[str, Any]] = {  # options by label
    "ls": {"loss": "ls"},
    "uw": {"loss": "uw"},
    "go4align": {"loss": "go4align"},
    "famo, next_batch": {"loss": "famo", "loss_options": {"next_batch": True}},
}
GRADIENT_RULES = {"imtl": "IMTLG", "pcgrad": "PCGrad", "mgda": "MGDA", "upgrad": "UPGrad"}  # names of ours and of TorchJD
ENGINES = ("auto", "loop", "batched")


def plain_step(network: Network) -> None:
    """Run an ordinary step."""
    torch.stack(network()[1]).sum().backward()


def stage_step(network: Network, num_tasks: int, **options: Any) -> Callable[[], object]:
    """Return a step of a `Balancer`."""
    balancer = Balancer(num_tasks, **options)
    shared = list(network.trunk.parameters())

    def step() -> None:
        features, losses = network()
        balancer.backward(dict(zip(balancer.tasks, losses, strict=True)), shared=shared, features=features)

    return step


def rules(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    """Return steps of the rules by label."""
    steps: dict[str, Callable[[], object]] = {PLAIN: partial(plain_step, network)}
    steps |= {label: stage_step(network, num_tasks, **options) for label, options in LOSS_RULES.items()}
    steps["imtl, textbook loop"] = partial(textbook_loop, network)
    for ours, theirs in GRADIENT_RULES.items():
        steps[ours] = stage_step(network, num_tasks, gradient=ours)
        if installed():
            steps[f"{ours}, TorchJD"] = jacobian_step(network, theirs)
    steps["imtl on features"] = stage_step(network, num_tasks, gradient="imtl", source="features")
    return steps


def engines(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    """Return steps of the engines by label."""
    steps: dict[str, Callable[[], object]] = {PLAIN: partial(plain_step, network)}
    steps |= {f"engine={engine}": stage_step(network, num_tasks, gradient="imtl", engine=engine) for engine in ENGINES}
    if installed():
        steps["TorchJD, mtl_backward"] = jacobian_step(network, "IMTLG")
        steps["TorchJD, autogram"] = gramian_step(network, "IMTLGWeighting")
    return steps


def measure(
    name: str, num_tasks: int, variants: Callable[[Network, int], dict[str, Callable[[], object]]], budget: float
) -> dict[str, dict[str, Any]]:
    """Return times of the variants on a network."""
    torch.manual_seed(0)
    network = SMALL_NETWORKS[name](num_tasks)
    steps = variants(network, num_tasks)
    times = times_in_turns(steps, network.zero_grad, warm_up=5, budget=budget, clock=time.thread_time)
    rows = summaries(times, PLAIN)
    print(f"\n{name} K={num_tasks}")
    for label, row in rows.items():
        print(
            f"  {label:26s} {row['ms']:9.3f} ms  {row['ratio']:6.2f} x  (quartiles {row['spread_ms']:.3f} ms apart)", flush=True
        )
    return rows


def main() -> None:
    """Measure all steps, print the tables and write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", type=int, default=[4, 11], help="tasks of the rules")
    parser.add_argument("--engine-tasks", nargs="+", type=int, default=[3, 11, 40])
    parser.add_argument("--budget", type=float, default=4, help="seconds for each column")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # torch's notice about vmap of attention
    smallest = next(iter(SMALL_NETWORKS))
    write({f"K={k}": measure(smallest, k, rules, 3 * options.budget) for k in options.tasks}, "overhead", options.output)
    names = {name: name.replace(" ", "-") for name in SMALL_NETWORKS}
    by_size = {
        f"{names[name]} K={k}": measure(name, k, engines, options.budget) for k in options.engine_tasks for name in names
    }
    write(by_size, "engines", options.output)


if __name__ == "__main__":
    main()
