"""Time and memory of a whole step, engine by engine, next to an ordinary step, a textbook loop and TorchJD, on one thread.

    python benchmarks/bench_jacobian.py [--networks mlp resnet] [--tasks 3 11 40] [--budget 20]

A step is a forward pass and a (balanced) backward pass. All variants but the first two balance with IMTL-G, which is solved in
next to no time. Every cell is a median, relative to ``losses.sum().backward()`` in the same run. Memory is the peak of a step
above the peak of that ordinary step, relative to the Jacobian. A network on which K ordinary steps take longer than 3 seconds
is left out at that K, unless it is named.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from networks import NETWORKS, Network
from peers import gramian_step, installed, jacobian_step
from record import FOLDER, write
from show import draw, steps_table
from timing import summaries, times_in_turns

from balance import Balancer, Splitter
from balance.profiling import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = "losses.sum().backward()"
MEASURED = "measure=last quarter"
SLOW = 3  # seconds for K ordinary steps
STAGES: dict[str, dict[str, Any]] = {  # options by variant
    "loss balancer: famo": {"loss": "famo", "gradient": None},
    "loss balancer: go4align": {"loss": "go4align", "gradient": None},
    "parameters": {},
    "parameters, engine=batched": {"engine": "batched"},
    "parameters, memory=gramian": {"memory": "gramian"},
    MEASURED: {},
    "features": {"source": "features"},
}


def variants(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    """Return steps by name."""
    steps: dict[str, Callable[[], object]] = {
        PLAIN: lambda: torch.stack(network()[1]).sum().backward(),
        "forward + K trunk backwards": lambda: trunk_passes(network),
        "textbook loop": lambda: textbook_loop(network),
        **{name: stage_step(network, num_tasks, measured=name == MEASURED, **options) for name, options in STAGES.items()},
        **{f"splitter: {rule}": splitter_step(network, num_tasks, rule) for rule in ("normalized", "imtl")},
    }
    if installed():
        steps["torchjd mtl_backward + jac_to_grad"] = jacobian_step(network, "IMTLG")
        steps["torchjd autogram"] = gramian_step(network, "IMTLGWeighting")
    return steps


def trunk_passes(network: Network) -> None:
    """Run a forward pass, one backward pass through each head, and K backward passes through the trunk."""
    features, losses = network()
    reached = [[features, *head.parameters()] for head in network.heads]
    cotangents = [torch.autograd.grad(loss, of, retain_graph=True)[0] for loss, of in zip(losses, reached, strict=True)]
    for k, cotangent in enumerate(cotangents):
        torch.autograd.grad(features, list(network.trunk.parameters()), cotangent, retain_graph=k < len(cotangents) - 1)


def textbook_loop(network: Network) -> None:
    """Run IMTL-G as usually written: a loop over the tasks, a Jacobian of flat rows, and a product with it."""
    trunk = list(network.trunk.parameters())
    _, losses = network()
    rows = []
    for loss, head in zip(losses, network.heads, strict=True):
        *gradients, weight, bias = torch.autograd.grad(loss, [*trunk, head.weight, head.bias], retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        head.weight.grad, head.bias.grad = weight, bias
    J = torch.stack(rows)
    G = J @ J.T
    direction = torch.linalg.lstsq(G, G.diagonal().sqrt(), driver="gelsd").solution @ J
    for parameter, piece in zip(trunk, torch.split(direction, [p.numel() for p in trunk]), strict=True):
        parameter.grad = piece.view_as(parameter)


def stage_step(
    network: Network, num_tasks: int, *, measured: bool = False, loss: str = "ls", gradient: str | None = "imtl", **options: Any
) -> Callable[[], object]:
    """Return a step of a `Balancer`; ``measured``: conflict is measured on the last quarter of the layers."""
    balancer = Balancer(num_tasks, loss=loss, gradient=gradient, **options)
    part = network.last_quarter if measured else None

    def step() -> None:
        features, losses = network()
        by_task = dict(zip(balancer.tasks, losses, strict=True))
        balancer.backward(by_task, shared=network.trunk.parameters(), features=features, measure=part)

    return step


def splitter_step(network: Network, num_tasks: int, gradient: str) -> Callable[[], object]:
    """Return an ordinary step with a `Splitter` between trunk and heads."""
    splitter = Splitter(num_tasks, gradient=gradient)
    return lambda: torch.stack(network(splitter)[1]).sum().backward()


def measure(network: Network, num_tasks: int, budget: float) -> dict[str, dict[str, Any]]:
    """Return times and peaks of all variants; a variant that fails has the error in its row."""
    steps = variants(network, num_tasks)
    size = 4 * num_tasks * sum(p.numel() for p in network.trunk.parameters())
    failed, peaks = {}, {}
    for name, step in steps.items():
        network.zero_grad()
        try:
            step()  # also warms up
            network.zero_grad()
            peaks[name] = peak_memory(step)
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result, too
            failed[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    rows = summaries(times_in_turns({name: steps[name] for name in peaks}, network.zero_grad, budget=budget), PLAIN)
    for name, peak in peaks.items():
        extra = peak - peaks[PLAIN]
        rows[name] |= {"extra_bytes": extra, "extra_over_jacobian": round(extra / size, 3)}
    return {name: (rows | failed)[name] for name in steps}


def seconds(network: Network) -> float:
    """Return the time of an ordinary step, the second of two."""
    begin = 0.0
    for _ in range(2):
        network.zero_grad()
        begin = time.perf_counter()
        torch.stack(network()[1]).sum().backward()
    return time.perf_counter() - begin


def cosine_error(make: Callable[[int], Network], num_tasks: int) -> dict[str, float]:
    """Return the error of the cosines on the last quarter of the layers against all layers, on a fresh network."""
    torch.manual_seed(0)
    network = make(num_tasks)
    cosines = []
    for part in (None, network.last_quarter):
        network.zero_grad()
        features, losses = network()
        balancer = Balancer(num_tasks, gradient="imtl")
        by_task = dict(zip(balancer.tasks, losses, strict=True))
        report = balancer.backward(by_task, shared=network.trunk.parameters(), features=features, measure=part)
        assert report.cosines is not None
        cosines.append(report.cosines)
    error = (cosines[1] - cosines[0])[~torch.eye(num_tasks, dtype=torch.bool)].abs()
    return {"mean": round(float(error.mean()), 4), "largest": round(float(error.max()), 4)}


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the rows of a network."""
    error = rows[MEASURED]["cosine_error"]
    print(f"\n{title}\n  cosines on the last quarter of the layers are off by {error['mean']}, at most {error['largest']}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"  {name:36s} {row['failed']}")
        else:
            print(
                f"  {name:36s} {row['ms']:9.2f} ms {row['ratio']:7.2f} x   memory {row['extra_over_jacobian']:7.2f}   "
                f"(quartiles {row['spread_ms']:.2f} ms apart, {row['repeats']} times)",
                flush=True,
            )


def main() -> None:
    """Measure all networks, print the tables, write the record and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=None)
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 11, 40])
    parser.add_argument("--budget", type=float, default=15, help="seconds for each table")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file and the plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # torch's notice about vmap of attention
    results = {}
    for num_tasks in options.tasks:
        for name in options.networks or NETWORKS:
            torch.manual_seed(0)
            network = NETWORKS[name](num_tasks)
            if options.networks is None and num_tasks * seconds(network) > SLOW:
                continue
            title = f"{name} K={num_tasks} P={sum(p.numel() for p in network.trunk.parameters())}"
            rows = results[title] = measure(network, num_tasks, options.budget)
            rows[MEASURED]["cosine_error"] = cosine_error(NETWORKS[name], num_tasks)
            show(title, rows)
    draw(results, write(results, "jacobian", options.output).with_suffix(".png"))
    for num_tasks in options.tasks:
        print("", steps_table(results, num_tasks), sep="\n")


if __name__ == "__main__":
    main()
