"""Synthetic comparisons, for tests of tables, figures and reports."""

from itertools import combinations

import numpy as np

from balance.comparison.recorded_run import RecordedRun
from balance.comparison.run_table import Row, RunTable
from balance.comparison.statistics import Estimate

TASKS = ("left", "right", "sum", "reconstruction")
METRICS = {"left/accuracy": 0.97, "right/accuracy": 0.96, "sum/mae": 1.4, "reconstruction/rmse": 0.15}
HIGHER = frozenset({"left/accuracy", "right/accuracy"})
BASELINES = {"left/accuracy": 0.978, "right/accuracy": 0.983, "sum/mae": 1.276, "reconstruction/rmse": 0.117}
VERDICTS = ("best", "alike", "alike", "unclear")
PAIRS = [(loss, gradient) for gradient in (None, "pcgrad", "nashmtl") for loss in ("ls", "uw", "famo", "go4align")]


def estimate(*values, verdict="unclear"):
    return Estimate(dict(enumerate(values)), verdict)


def row(label="ls", *, seeds=3, failed=0, metrics=None, delta_m=None, mean_rank=1.0, time=1.0, memory=2.5):
    loss, _, gradient = label.split(" ")[0], *label.partition(" + ")[1:]
    runs = tuple(
        RecordedRun(
            f"{loss}{gradient}{seed}",
            loss,
            gradient or None,
            seed,
            {},
            {n: e.values.get(seed) for n, e in (metrics or {}).items()},
        )
        for seed in range(seeds)
    )
    return Row(label, loss, gradient or None, runs, failed, metrics or {}, delta_m, mean_rank, time, memory)


def comparison(*rows, metrics=(), higher=HIGHER, baselines=BASELINES, **others):
    names = tuple(metrics or rows[0].metrics)
    return RunTable("digits", tuple(rows), names, frozenset(higher) & set(names), baselines, **others)


def two_rows():
    """The best row, and a row that cannot be distinguished from it; every number can be checked by hand."""
    first = {
        "left/accuracy": estimate(0.96, 0.97, 0.98, verdict="alike"),
        "sum/mae": estimate(1.25, 1.5, 1.75, verdict="best"),
    }
    second = {
        "left/accuracy": estimate(0.98, 0.98, 0.98, verdict="best"),
        "sum/mae": estimate(2.0, 2.25, 2.5, verdict="unclear"),
    }
    return comparison(
        row("famo", metrics=first, delta_m=estimate(3.0, 4.0, 5.0, verdict="best"), mean_rank=1.5),
        row(
            "uw + pcgrad",
            metrics=second,
            delta_m=estimate(-1.0, 6.0, 13.0, verdict="alike"),
            mean_rank=1.5,
            time=2.25,
            memory=4.0,
        ),
        baselines={"left/accuracy": 0.99, "sum/mae": 1.2},
        baselines_from="a file",
        notes=("A note.",),
    )


def realistic(pairs=(*PAIRS, ("scaleinvls", "mgda")), seeds=3, tasks=TASKS, baselines=True):
    """Many rows: the earlier, the better."""
    rng = np.random.default_rng(0)
    names = [name for name in METRICS if name.partition("/")[0] in tasks] or [f"{task}/mae" for task in tasks]
    rows = []
    for k, (loss, gradient) in enumerate(reversed(pairs)):
        drift = 1 + 0.3 * k / len(pairs) + 0.1 * rng.random(len(names)) * (k > 0)
        centres = {n: METRICS.get(n, 1.0) * (2 - d if n in HIGHER else d) for n, d in zip(names, drift, strict=True)}
        metrics = {
            name: estimate(*(centre * (1 + 0.01 * rng.standard_normal(seeds))), verdict=VERDICTS[min(k, 3)])
            for name, centre in centres.items()
        }
        drops = estimate(*(2.5 + 1.5 * k + rng.standard_normal(seeds)), verdict=VERDICTS[min(k, 3)])
        cost = {"seeds": seeds, "time": 2.3 if gradient else 1.0, "memory": 5.1 if gradient else 2.4, "mean_rank": 1.0 + k}
        label = " + ".join(filter(None, (loss, gradient)))
        rows.append(row(label, metrics=metrics, delta_m=drops if baselines else None, **cost))
    known = {name: BASELINES.get(name, 0.9) for name in names} if baselines else None
    return comparison(*rows, baselines=known, baselines_from="experiments/problems/digits/baselines.yaml" if baselines else "")


def curves(of, tasks=TASKS, points=200):
    """Curves that the runs of a comparison might have logged."""
    rng = np.random.default_rng(1)
    steps = np.arange(points) * 10.0
    logged = {}
    for k, line in enumerate(of.rows):
        series = {}
        for i, task in enumerate(tasks):
            fall = (0.02 * (i + 1) + np.exp(-steps / (100 + 40 * k))) * 5.0 ** (2 - i)
            wander = np.cumsum(rng.standard_normal(points)) * (0 if line.loss_method == "ls" else 0.03)
            series[f"loss/{task}"] = steps, fall * np.exp(0.1 * rng.standard_normal(points))
            series[f"weight/{task}"] = steps, np.exp(wander)
            series[f"gradient_weight/{task}"] = steps, np.exp(-wander) if line.gradient_method else np.ones(points)
        if line.gradient_method:
            names = [f"cosine/{a}__{b}" for a, b in combinations(tasks, 2)]
            cosines = rng.normal(0, 0.5, (len(names), 1)) + 0.5 * rng.standard_normal((len(names), points)) - steps / 4000
            series |= {name: (steps, np.tanh(values)) for name, values in zip(names, cosines, strict=True)}
            series["conflicts"] = steps, (cosines < 0).sum(0).astype(float)
        if points > 1:
            epochs = np.arange(0, points, 10)
            series |= {f"val/{task}/error": (steps[epochs], series[f"loss/{task}"][1][epochs] / 2) for task in tasks}
        logged[line.label] = series
    return logged
