"""Time and accuracy of the gradient balancers over K, without a network, next to TorchJD 0.18 in one run, on one thread.

    python benchmarks/bench_rules.py [--repeats 15] [--sizes 3 11 40 100 300 1000] [--rules mgda cagrad]

Each problem is a random Jacobian of K gradients of different length in 1000 dimensions; both sides get its Gramian in float64.
Rules that see the Jacobian get it. TorchJD's rules that exist for Jacobians only, but need the Gramian only, get a square root.
Times are medians over calls on all problems, which come in short bursts, in turns. A rule that takes more than a second is
called once for each problem. Accuracy is the certificate in the rule's registration, the worst of all problems, for the weights
of both sides.
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
from show import PEER, rules_table

from balance import gradient_balancers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Rule = Callable[[Tensor], Tensor]

SIZES = (3, 11, 40, 100)
PROBLEMS = 3
BURST_MS = 5.0  # a burst of calls of one rule takes about so long
LIMIT_MS = 1_000  # a rule that has taken so long on a problem is not called again on it


def jacobian(num_tasks: int, seed: int) -> Tensor:
    """Return a random Jacobian. Shape (K, 1000), float64."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(num_tasks, 1000, generator=generator, dtype=torch.float64)
    common = torch.randn(1000, generator=generator, dtype=torch.float64)  # so that gradients agree and conflict
    lengths = (0.7 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64)).exp()
    return (J + 0.3 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64) * common) * lengths


def problem(num_tasks: int, seed: int) -> Tensor:
    """Return the Gramian of a random Jacobian. Shape (K, K), float64."""
    J = jacobian(num_tasks, seed)
    return J @ J.T


def ours(num_tasks: int, sees: str = "gramian") -> dict[str, Rule]:
    """Return all registered rules that see the Gramian or the Jacobian, with default options."""
    names = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == sees]
    return {name: gradient_balancers.build(name, num_tasks=num_tasks) for name in names}


def peers(num_tasks: int) -> dict[str, Rule]:
    """Return the rules of TorchJD for Gramians, scaled to our default options; none if it is not installed."""
    try:
        from torchjd import aggregation  # noqa: PLC0415
        from torchjd.aggregation._nash_mtl import _NashMTLWeighting  # noqa: PLC0415
    except ImportError as error:
        print(f"torchjd is left out: {error}", file=sys.stderr)
        return {}
    averse = aggregation.CAGradWeighting(c=0.4)
    config = aggregation.ConFIG()
    nash = _NashMTLWeighting(n_tasks=num_tasks, max_norm=0.0, update_weights_every=1, optim_niter=20)

    def bargain(gramian: Tensor) -> Tensor:
        nash.reset()
        square_jacobian = torch.linalg.cholesky(gramian)  # the smallest Jacobian that has this Gramian
        return nash(square_jacobian) / num_tasks**0.5  # a direction of length 1

    return {
        "mgda": aggregation.MGDAWeighting(),
        "pcgrad": aggregation.PCGradWeighting(),
        "cagrad": lambda gramian: averse(gramian) / (1 + 0.4**2),
        "imtl": aggregation.IMTLGWeighting(),
        "nashmtl": bargain,
        "upgrad": aggregation.UPGradWeighting(),
        "dualproj": aggregation.DualProjWeighting(),
        "aligned_mtl": aggregation.AlignedMTLWeighting(),
        "fairgrad": aggregation.FairGradWeighting(alpha=2.0),
        "gradvac": aggregation.GradVacWeighting(),
        "krum": aggregation.KrumWeighting(n_byzantine=0),
        "config": lambda gramian: equal_angles(torch.linalg.cholesky(gramian), config),
    }


def equal_angles(square_jacobian: Tensor, config: Rule) -> Tensor:
    """Return the weights of TorchJD's direction of a square Jacobian. Shape (K, K) -> (K,)."""
    return torch.linalg.solve(square_jacobian.T, config(square_jacobian))


def jacobian_peers() -> dict[str, Rule]:
    """Return the rules of TorchJD that exist for Jacobians only; none if it is not installed."""
    try:
        from torchjd import aggregation  # noqa: PLC0415
    except ImportError:
        return {}
    return {"trimmed_mean": aggregation.TrimmedMean(1), "graddrop": aggregation.GradDrop()}


def accuracy(name: str, gramian: Tensor, weights: Tensor) -> float | None:
    """Return the error of the weights in the certificate of a rule; None if it has no certificate."""
    certificate = gradient_balancers.traits(name).certificate
    return None if certificate is None else certificate(gramian, weights)


def times_in_bursts(rules: dict[str, Rule], data: Tensor, repeats: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Return milliseconds of calls by rule, and the results of the first calls, which are timed only if they are slow."""
    first = {name: timed(rule, data) for name, rule in rules.items()}
    times: dict[str, list[float]] = {name: [ms] if ms > LIMIT_MS else [] for name, (ms, _) in first.items()}
    calls = dict.fromkeys(rules, 1)
    for _ in range(repeats):
        for name, rule in rules.items():
            if sum(times[name]) > LIMIT_MS:
                continue
            burst = [timed(rule, data)[0] for _ in range(calls[name])]
            times[name].extend(burst)
            calls[name] = max(1, min(100, int(BURST_MS / statistics.median(burst))))
    return times, {name: result for name, (_, result) in first.items()}


def timed(rule: Rule, data: Tensor, clock: Callable[[], float] = time.perf_counter) -> tuple[float, Tensor]:
    """Return the milliseconds of one call of a rule, and its result."""
    start = clock()
    result = rule(data)
    return 1e3 * (clock() - start), result


def measure(num_tasks: int, repeats: int, names: list[str] | None = None) -> dict[str, dict[str, float | None]]:
    """Return time and worst error of every rule, TorchJD's rules with a prefix, on all problems of one size."""
    times: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(PROBLEMS):
        G = problem(num_tasks, seed)
        rules = with_prefix(ours(num_tasks), peers(num_tasks), names)
        on_jacobians = with_prefix(ours(num_tasks, "jacobian"), jacobian_peers(), names)
        bursts, weights = times_in_bursts(rules, G, repeats)
        bursts |= times_in_bursts(on_jacobians, jacobian(num_tasks, seed), repeats)[0]
        for label, burst in bursts.items():
            times.setdefault(label, []).extend(burst)
        for label, w in weights.items():
            error = accuracy(label.removeprefix(PEER), G, w.double())
            errors.setdefault(label, []).extend([] if error is None else [error])
    rows: dict[str, dict[str, float | None]] = {
        label: {
            "error": max(errors.get(label, []), default=None),
            "ms": round(statistics.median(all_ms), 4),
            "worst_ms": round(max(all_ms), 4),
        }
        for label, all_ms in times.items()
    }
    for label in set(rows).intersection(gradient_balancers.names()):
        peer = rows.get(PEER + label)
        rows[label]["times_faster"] = None if peer is None else round((peer["ms"] or 0) / (rows[label]["ms"] or 1), 2)
    return rows


def with_prefix(rules: dict[str, Rule], others: dict[str, Rule], names: list[str] | None = None) -> dict[str, Rule]:
    """Return the named rules of both sides by label, all if no names are given; TorchJD's rules have a prefix."""
    labelled = rules | {PEER + name: rule for name, rule in others.items()}
    return {label: rule for label, rule in labelled.items() if names is None or label.removeprefix(PEER) in names}


def show(num_tasks: int, rows: dict[str, dict[str, float | None]]) -> None:
    """Print the rows of one size, every rule next to its peer."""
    print(f"\nK = {num_tasks}")
    for label in sorted(rows, key=lambda label: (label.removeprefix(PEER), label)):
        row = rows[label]
        error = "" if row["error"] is None else f"error {row['error']:.1e}"
        faster = "" if row.get("times_faster") is None else f"{row['times_faster']:8.1f} times faster"
        print(f"  {label:17s} {row['ms']:10.3f} ms  {error:16s} {faster}")


def main() -> None:
    """Measure all sizes, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of tasks")
    parser.add_argument("--rules", nargs="+", choices=gradient_balancers.names(), help="default: all")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # TorchJD's solver warns at every inaccurate solution
    for rule in ours(3).values():
        rule(problem(3, 0))  # loads LAPACK before the clock runs
    results = {}
    for num_tasks in options.sizes:
        results[f"K={num_tasks}"] = measure(num_tasks, options.repeats, options.rules)
        show(num_tasks, results[f"K={num_tasks}"])
    print("", rules_table(results), sep="\n")
    write(results, "rules", options.output)


if __name__ == "__main__":
    main()
