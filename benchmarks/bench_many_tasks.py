"""Time and memory of a step with up to 1000 tasks, over K: many heads, one loss per sample, and the rules, on one thread.

    python benchmarks/bench_many_tasks.py [--tasks 3 10 30 100 300 1000] [--budget 1]

A step is a forward pass and a balanced backward pass with equal weights, so that the rule costs nothing. The networks are tiny:
what grows here is the work by task, not the work of the layers. Times are medians of the CPU time of one thread, relative to
``losses.sum().backward()`` in the same run. The backward passes of K losses and nothing else are one of the steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_rules import problem, timed
from networks import Network
from record import FOLDER, write
from show import draw_over_tasks, many_tasks_table
from timing import summaries, times_in_turns
from torch import nn
from torch.nn import functional

from balance import Balancer, Splitter, gradient_balancers
from balance.profiling import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Steps = dict[str, Callable[[], object]]

PLAIN, PASSES = "losses.sum().backward()", "K passes by torch.autograd.grad"
RULES = ("mean", "imtl", "pcgrad", "mgda", "cagrad", "nashmtl", "aligned_mtl", "upgrad")
STAGES: dict[str, dict[str, Any]] = {  # options by variant
    "loop": {"engine": "loop"},
    "batched": {"engine": "batched"},
    "memory=gramian": {"memory": "gramian"},
    "features": {"source": "features"},
}
SLOWEST_MS = 2_000  # a step or a rule that takes longer is not timed with more tasks


def trunk() -> nn.Module:
    """Build 2 layers of 64; 6200 parameters."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


def steps_of_heads(num_tasks: int) -> tuple[nn.Module, Steps]:
    """Return a network with K linear heads, and steps by name."""
    network = Network(trunk(), torch.randn(16, 32), 64, num_tasks)
    shared, names = list(network.trunk.parameters()), [str(k) for k in range(num_tasks)]
    splitter = Splitter(num_tasks, gradient="mean")

    def stage(*, stacked: bool = False, hint: bool = True, **options: Any) -> Callable[[], object]:
        balancer = Balancer(num_tasks, gradient="mean", **options)

        def step() -> None:
            features, losses = network()
            given = torch.stack(losses) if stacked else dict(zip(names, losses, strict=True))
            balancer.backward(given, shared=shared, features=features if hint else None)

        return step

    def passes() -> None:
        _, losses = network()
        for loss, head in zip(losses, network.heads, strict=True):
            torch.autograd.grad(loss, [*shared, *head.parameters()], retain_graph=True)

    return network, {
        PLAIN: lambda: torch.stack(network()[1]).sum().backward(),
        PASSES: passes,
        **{name: stage(**options) for name, options in STAGES.items()},
        "loop, losses stacked": stage(engine="loop", stacked=True),
        "loop, without features=": stage(engine="loop", hint=False),
        "Splitter": lambda: torch.stack(network(splitter)[1]).sum().backward(),
    }


def steps_of_samples(num_tasks: int) -> tuple[nn.Module, Steps]:
    """Return a network and steps with one loss for each of K samples, by name."""
    network = nn.Sequential(trunk(), nn.Linear(64, 8))
    x, y, shared = torch.randn(num_tasks, 32), torch.randint(8, (num_tasks,)), list(network.parameters())

    def forward() -> tuple[Tensor, Tensor]:
        features = network[0](x)
        return features, functional.cross_entropy(network[1](features), y, reduction="none")

    def stage(**options: Any) -> Callable[[], object]:
        balancer = Balancer(None, gradient="mean", **options)
        parameters = shared if options.get("source") != "features" else list(network[0].parameters())

        def step() -> None:
            features, losses = forward()
            balancer.backward(losses, shared=parameters, features=features if "source" in options else None)

        return step

    def passes() -> None:
        losses = forward()[1]
        for beginning in torch.eye(num_tasks).unbind():
            torch.autograd.grad(losses, shared, beginning, retain_graph=True)

    return network, {
        PLAIN: lambda: forward()[1].sum().backward(),
        PASSES: passes,
        "one loss per sample": stage(),
        "one loss per sample, features": stage(source="features"),
    }


PROBLEMS = {"heads": steps_of_heads, "samples": steps_of_samples}


def measure(name: str, num_tasks: int, budget: float, left_out: set[str]) -> dict[str, dict[str, Any]]:
    """Return times and peaks of all steps of a problem but some; steps that are too slow for more tasks join those."""
    torch.manual_seed(0)
    network, steps = PROBLEMS[name](num_tasks)
    steps = {label: step for label, step in steps.items() if label not in left_out}
    peaks = {}
    for label, step in steps.items():
        network.zero_grad()
        peaks[label] = peak_memory(step)  # also warms up

    def prepare() -> None:
        network.zero_grad()
        gc.collect()  # or one step pays for the graphs of the steps before it

    times = times_in_turns(steps, prepare, budget=budget, clock=time.thread_time)
    rows = summaries(times, PLAIN)
    for label, row in rows.items():
        row["mib"] = round(peaks[label] / 2**20, 3)
    left_out |= {label for label, row in rows.items() if row["ms"] > SLOWEST_MS}
    return rows


def measure_rules(num_tasks: int, budget: float, left_out: set[str]) -> dict[str, dict[str, Any]]:
    """Return the time of a solve of each rule but some, on a random Gramian; rules that are too slow for more join those."""
    G, rows = problem(num_tasks, 0), {}
    for name in (name for name in RULES if name not in left_out):
        rule = gradient_balancers.build(name, num_tasks=num_tasks)
        times = [timed(rule, G, time.thread_time)[0]]
        if times[0] > SLOWEST_MS:
            left_out.add(name)
        elif times[0] < 1e3 * budget:
            times = []  # the first call also warms up
        while len(times) < 5 and sum(times) < 1e3 * budget:
            times.append(timed(rule, G, time.thread_time)[0])
        rows[name] = {"ms": round(statistics.median(times), 4), "repeats": len(times)}
    return rows


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the rows of a size."""
    print(f"\n{title}")
    for label, row in rows.items():
        more = f"{row['ratio']:9.2f} x {row['mib']:9.2f} MiB" if "ratio" in row else ""
        print(f"  {label:34s} {row['ms']:10.2f} ms {more}  ({row['repeats']} times)", flush=True)


def main() -> None:
    """Measure all sizes, print the tables, write the record and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 10, 30, 100, 300, 1000])
    parser.add_argument("--budget", type=float, default=1, help="seconds for each table")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file and the plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.freeze()
    results = {}
    for name in (*PROBLEMS, "rules"):
        left_out: set[str] = set()
        for num_tasks in options.tasks:
            title = f"{name} K={num_tasks}"
            if name == "rules":
                results[title] = measure_rules(num_tasks, options.budget / 4, left_out)
            else:
                results[title] = measure(name, num_tasks, options.budget, left_out)
            show(title, results[title])
    draw_over_tasks(results, write(results, "many_tasks", options.output).with_suffix(".png"))
    for name in (*PROBLEMS, "rules"):
        print("", many_tasks_table(results, name), sep="\n")


if __name__ == "__main__":
    main()
