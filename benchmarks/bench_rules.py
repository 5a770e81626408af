"""Gradient balancers alone, over K: time and accuracy, beside TorchJD 0.18 in one run, on one thread.

    python benchmarks/bench_rules.py [--repeats 21]

Each problem is a random Jacobian of K gradients of different length in 1000 dimensions; both sides get its Gramian in float64.
Times are medians over calls, which come in short bursts, in turns. Accuracy is the certificate in the rule's registration, the
worst of all problems, for the weights of both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before numpy loads

import torch
from record import FOLDER, write

from balance import gradient_balancers
from balance.solvers.conflict_averse import conflict_averse_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SIZES = (3, 11, 40, 100)
PROBLEMS = 3
BURST_MS = 10.0  # calls of a rule follow one another for about so long before the next rule has its turn


def problem(num_tasks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(num_tasks, 1000, generator=generator, dtype=torch.float64)
    common = torch.randn(1000, generator=generator, dtype=torch.float64)  # so that gradients agree and conflict
    lengths = (0.7 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64)).exp()
    J = (J + 0.3 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64) * common) * lengths
    return J @ J.T


def ours(num_tasks: int) -> dict[str, Callable[[Tensor], Tensor]]:
    names = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == "gramian"]
    return {name: gradient_balancers.build(name, num_tasks=num_tasks) for name in names}


def peers(num_tasks: int) -> dict[str, Callable[[Tensor], Tensor]]:
    try:
        from torchjd.aggregation import (  # noqa: PLC0415
            CAGradWeighting,
            IMTLGWeighting,
            MGDAWeighting,
            PCGradWeighting,
        )
        from torchjd.aggregation._nash_mtl import _NashMTLWeighting  # noqa: PLC0415
    except ImportError as error:
        print(f"torchjd is left out: {error}", file=sys.stderr)
        return {}
    averse = CAGradWeighting(c=0.4)
    nash = _NashMTLWeighting(n_tasks=num_tasks, max_norm=0.0, update_weights_every=1, optim_niter=20)

    def bargain(gramian: Tensor) -> Tensor:  # it takes a Jacobian: the smallest one with this Gramian
        nash.reset()
        return nash(torch.linalg.cholesky(gramian)) / num_tasks**0.5  # the length 1 of our default options

    return {
        "mgda": MGDAWeighting(),
        "pcgrad": PCGradWeighting(),
        "cagrad": lambda gramian: averse(gramian) / (1 + 0.4**2),  # the rescaling of our default options
        "imtl": IMTLGWeighting(),
        "nashmtl": bargain,
    }


def accuracy(name: str, G: Tensor, w: Tensor) -> float | None:
    certificate = gradient_balancers.traits(name).certificate
    return None if certificate is None else certificate(G, w)


def times_of(rules: dict[str, Callable[[Tensor], Tensor]], G: Tensor, repeats: int, limit: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in rules}
    calls = dict.fromkeys(rules, 1)
    for turn in range(repeats + 1):
        for name, rule in rules.items():
            if sum(times[name]) > limit and len(times[name]) >= 3:
                continue  # a slow one has said enough
            burst = []
            for _ in range(calls[name]):
                start = time.perf_counter()
                rule(G)
                burst.append(1e3 * (time.perf_counter() - start))
            if turn:
                times[name].extend(burst)
            calls[name] = max(1, min(100, int(BURST_MS / statistics.median(burst))))
    return times


def measure(num_tasks: int, repeats: int) -> dict[str, dict[str, float | None]]:
    rows: dict[str, dict[str, float | None]] = {}
    collected: dict[str, list[float]] = {}
    for seed in range(PROBLEMS):
        G = problem(num_tasks, seed)
        sides = {"": ours(num_tasks), "torchjd ": peers(num_tasks)}
        rules = {prefix + name: rule for prefix, side in sides.items() for name, rule in side.items()}
        for label, found in times_of(rules, G, repeats, limit=5_000).items():
            collected.setdefault(label, []).extend(found)
        for label, rule in rules.items():
            error = accuracy(label.removeprefix("torchjd "), G, rule(G).double())
            worst = rows.setdefault(label, {"error": error})["error"]
            rows[label]["error"] = error if worst is None or (error is not None and error > worst) else worst
    for label, found in collected.items():
        rows[label]["ms"] = round(statistics.median(found), 4)
        rows[label]["worst_ms"] = round(max(found), 4)
    for label in [label for label in rows if not label.startswith("torchjd ")]:
        peer = rows.get(f"torchjd {label}")
        rows[label]["times_faster"] = None if peer is None else round((peer["ms"] or 0) / (rows[label]["ms"] or 1), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # TorchJD's solver warns at every inaccurate solution
    conflict_averse_weights(problem(3, 0).numpy(), 0.4)  # load LAPACK before the clock runs
    results = {}
    for num_tasks in options.sizes:
        rows = results[f"K={num_tasks}"] = measure(num_tasks, options.repeats)
        print(f"\nK = {num_tasks}")
        for label in sorted(rows, key=lambda label: (label.removeprefix("torchjd "), label)):
            row = rows[label]
            error = "" if row["error"] is None else f"error {row['error']:.1e}"
            faster = "" if row.get("times_faster") is None else f"{row['times_faster']:8.1f} times faster"
            print(f"  {label:17s} {row['ms']:10.3f} ms  {error:16s} {faster}")
    write(results, "rules", options.output)


if __name__ == "__main__":
    main()
