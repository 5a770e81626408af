"""Time and memory of a whole step, engine by engine, beside an ordinary one, a textbook loop and TorchJD; one run, one thread.

    python benchmarks/bench_jacobian.py [--networks mlp resnet] [--tasks 2 3 11 40] [--budget 20]

A step is a forward pass and what replaces the backward pass; all but the first two balance with IMTL-G, which is solved in next
to no time. Every cell is a median, relative to ``losses.sum().backward()``. The variants take turns, so that a slow moment of
the machine hits all of them. Memory is what a step needs at its height beyond that ordinary one, relative to the Jacobian.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from networks import NETWORKS, Network
from peers import gramian_step, installed, jacobian_step
from record import FOLDER, write
from show import draw, markdown

from balance import Balancer, Splitter
from balance.profiling import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = "losses.sum().backward()"
FLOOR = "forward + K trunk backwards"
LOOP = "textbook loop"


def variants(network: Network, num_tasks: int) -> dict[str, Callable[[], object]]:
    """Steps by name."""
    trunk = list(network.trunk.parameters())

    def plain() -> None:
        torch.stack(network()[1]).sum().backward()

    def floor() -> None:
        features, losses = network()
        own = [[features, *head.parameters()] for head in network.heads]
        found = [torch.autograd.grad(loss, mine, retain_graph=True)[0] for loss, mine in zip(losses, own, strict=True)]
        for k, gradient in enumerate(found):
            torch.autograd.grad(features, trunk, gradient, retain_graph=k < num_tasks - 1)

    def loop() -> None:
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

    def stage(measure: bool = False, loss: str = "ls", gradient: str | None = "imtl", **options: Any) -> Callable[[], object]:  # noqa: FBT001, FBT002
        balancer = Balancer(num_tasks, loss=loss, gradient=gradient, **options)
        part = network.last_quarter if measure else None

        def step() -> None:
            features, losses = network()
            by_task = dict(zip(balancer.tasks, losses, strict=True))
            balancer.backward(by_task, shared=trunk, features=features, measure=part)

        return step

    def splitter(gradient: str) -> Callable[[], object]:
        split = Splitter(num_tasks, gradient=gradient)
        return lambda: torch.stack(network(split)[1]).sum().backward()

    steps = {
        PLAIN: plain,
        FLOOR: floor,
        LOOP: loop,
        "loss balancer: famo": stage(loss="famo", gradient=None),
        "loss balancer: go4align": stage(loss="go4align", gradient=None),
        "parameters": stage(),
        "parameters, engine=batched": stage(engine="batched"),
        "parameters, memory=gramian": stage(memory="gramian"),
        "measure=last quarter": stage(measure=True),
        "features": stage(source="features"),
        "splitter: normalized": splitter("normalized"),
        "splitter: imtl": splitter("imtl"),
    }
    if installed():
        steps["torchjd mtl_backward + jac_to_grad"] = jacobian_step(network, "IMTLG")
        steps["torchjd autogram"] = gramian_step(network, "IMTLGWeighting")
    return steps


def measure(steps: dict[str, Callable[[], object]], network: Network, budget: float, size: int) -> dict[str, dict[str, Any]]:
    """Medians and peaks; a variant that fails is reported, not left out in silence."""
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():  # also warms up
        network.zero_grad()
        try:
            step()
            network.zero_grad()
            peaks[name] = peak_memory(step)
        except Exception as error:  # noqa: BLE001
            rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    begin = time.perf_counter()
    while len(times[PLAIN]) < 2 or (time.perf_counter() - begin < budget and len(times[PLAIN]) < 200):
        for name in peaks:
            network.zero_grad()
            start = time.perf_counter()
            steps[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    plain = statistics.median(times[PLAIN])
    for name, found in times.items():
        if name in peaks:
            quartiles = statistics.quantiles(found, n=4)
            rows[name] = {
                "ms": round(statistics.median(found), 3),
                "spread_ms": round(quartiles[2] - quartiles[0], 3),
                "repeats": len(found),
                "ratio": round(statistics.median(found) / plain, 3),
                "extra_bytes": peaks[name] - peaks[PLAIN],
                "extra_over_jacobian": round((peaks[name] - peaks[PLAIN]) / size, 3),
            }
    return {name: rows[name] for name in steps}


def surrogate_error(make: Callable[[int], Network], num_tasks: int) -> dict[str, float]:
    """How far the cosines on the last quarter of the layers are from those on all of them, on a network just initialised."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 3, 11, 40])
    parser.add_argument("--budget", type=float, default=30, help="seconds for each table")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file and the plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # said of attention, by torch, of its own vmap
    results = {}
    for num_tasks in options.tasks:
        for name in options.networks:
            torch.manual_seed(0)
            network = NETWORKS[name](num_tasks)
            P = sum(p.numel() for p in network.trunk.parameters())
            rows = measure(variants(network, num_tasks), network, options.budget, 4 * num_tasks * P)
            error = surrogate_error(NETWORKS[name], num_tasks)
            results[f"{name} K={num_tasks} P={P}"] = rows
            print(f"\n{name}, K = {num_tasks}, P = {P}")
            print(f"  cosines on the last quarter of the layers are off by {error['mean']}, at most {error['largest']}")
            rows["measure=last quarter"]["cosine_error"] = error
            for variant, row in rows.items():
                if "failed" in row:
                    print(f"  {variant:36s} {row['failed']}")
                else:
                    print(
                        f"  {variant:36s} {row['ms']:9.2f} ms {row['ratio']:7.2f} x   "
                        f"memory {row['extra_over_jacobian']:7.2f}   "
                        f"(quartiles {row['spread_ms']:.2f} ms apart, {row['repeats']} times)",
                        flush=True,
                    )
    file = write(results, "jacobian", options.output)
    draw(results, file.with_suffix(".png"))
    for num_tasks in options.tasks:
        print("", markdown(results, num_tasks), sep="\n")


if __name__ == "__main__":
    main()
