"""Runs -> one row for each pair of methods: means over seeds, intervals, ranks, and what can be told apart from the best."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from balance.metrics import delta_m, mean_rank

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

Verdict = Literal["best", "alike", "worse", "unclear"]

CONFIDENCE = 0.95
# n paired differences without any effect all have one sign in 2 of 2^n cases; below 5 % from six pairs on.
ENOUGH_SEEDS = 6
OF_METHODS = ("loss.", "gradient.", "balancer.")  # settings that belong to a pair of methods; all others are common


@dataclass(frozen=True)
class Run:
    """A run of the trainer, as recorded.

    Attributes:
        run_id: Of MLflow.
        loss_method: Name, or several joined by ``+``.
        gradient_method: Name, or None.
        seed: Of the run.
        settings: What else decides the result, by dotted key.
        metrics: Test metrics by ``<task>/<metric>``.
        finished: Whether it came to its end.
        step_ms: Time of a training step in milliseconds.
        step_mib: Memory that a training step needs beside parameters and the optimizer's state, in MiB.
        fingerprint: Shared by runs of one configuration and seed.
    """

    run_id: str
    loss_method: str
    gradient_method: str | None
    seed: int
    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    finished: bool = True
    step_ms: float = math.nan
    step_mib: float = math.nan
    fingerprint: str = ""

    @property
    def common(self) -> tuple[tuple[str, str], ...]:
        """Settings that do not belong to the methods, sorted."""
        return tuple(sorted((key, value) for key, value in self.settings.items() if not key.startswith(OF_METHODS)))


@dataclass(frozen=True)
class Estimate:
    """A number that was measured once for each seed; one that is not finite makes the mean NaN: leaving it out would flatter.

    Attributes:
        values: By seed.
        verdict: Whether the mean is the ``best`` of the table; ``alike``: not distinguishable from it; ``worse``; or
            ``unclear``: there are too few seeds to say.
    """

    values: Mapping[int, float]
    verdict: Verdict = "unclear"

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return sum(self.values.values()) / len(self.values) if self.values else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN for a single seed, or where the mean is no number."""
        n = len(self.values)
        if n < 2 or not math.isfinite(self.mean):
            return math.nan
        return statistics.stdev(self.values.values()) / math.sqrt(n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean, by Student's t distribution; NaN for a single seed."""
        n = len(self.values)
        if n < 2 or not math.isfinite(self.error):
            return math.nan, math.nan
        reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * self.error
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Row:
    """A pair of methods, with settings where those make a difference between rows.

    Attributes:
        label: What to call it.
        loss_method: Name.
        gradient_method: Name, or None.
        runs: Those that finished, one for each seed.
        failed: Number of seeds of which no run finished.
        metrics: Test metrics by ``<task>/<metric>``.
        delta_m: In percent; None without baselines.
        mean_rank: Among the rows of the table, 1 is best.
        time: Time of a step relative to ``ls``; NaN where that is not known.
        memory: Memory of a step in MiB; NaN where that is not known.
    """

    label: str
    loss_method: str
    gradient_method: str | None
    runs: tuple[Run, ...]
    failed: int
    metrics: Mapping[str, Estimate]
    delta_m: Estimate | None
    mean_rank: float
    time: float
    memory: float

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """A table of rows, best delta_m first (best mean rank without baselines).

    Attributes:
        experiment: Its name.
        rows: At least one.
        metrics: Names of the columns, ``<task>/<metric>``.
        higher_is_better: Those of the metrics that should be large.
        baselines: Single-task value of each metric; None where delta_m was not wanted.
        baselines_from: Where those are from, in words.
        notes: What a reader must know: seeds that are missing or failed, settings that differ.
    """

    experiment: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    higher_is_better: frozenset[str]
    baselines: Mapping[str, float] | None = None
    baselines_from: str = ""
    notes: tuple[str, ...] = field(default=())


def compare(
    runs: Sequence[Run],
    *,
    experiment: str,
    higher_is_better: Collection[str],
    baselines: Mapping[str, float] | None,
    baselines_from: str = "",
) -> Comparison:
    """The table of some runs.

    Args:
        runs: Newest first. Of several finished runs with the same methods, settings and seed the newest counts.
        experiment: Its name.
        higher_is_better: Names of the metrics that should be large.
        baselines: Single-task value of each metric; None: no delta_m.
        baselines_from: Where those are from, in words.

    Raises:
        ValueError: If no run is finished, two runs have different data, or a baseline is missing or zero.
    """
    finished = _newest([run for run in runs if run.finished])
    if not finished:
        raise ValueError(f"There are no finished runs of '{experiment}' to compare.")
    names = tuple(dict.fromkeys(name for run in finished for name in run.metrics))
    finished = [replace(run, metrics={name: run.metrics.get(name, math.nan) for name in names}) for run in finished]
    for run in finished:
        _check_same_data(run, finished[0])
    groups = _grouped([*finished, *_newest([run for run in runs if not run.finished])])
    done = {label: [run for run in group if run.finished] for label, group in groups.items()}
    means = {
        label: {name: Estimate({run.seed: run.metrics[name] for run in group}).mean for name in names}
        for label, group in done.items()
        if group
    }
    ranks = mean_rank(means, higher_is_better)
    plain = _plain_step_ms(finished)
    rows = [
        _row(label, group, groups[label], names, ranks[label], plain, higher_is_better, baselines)
        for label, group in done.items()
        if group
    ]
    rows.sort(key=lambda row: (_order(row.delta_m.mean if row.delta_m else row.mean_rank), row.mean_rank, row.label))
    notes = _notes(rows, [label for label, group in done.items() if not group])
    judged = _judged(rows, names, higher_is_better)
    return Comparison(experiment, judged, names, frozenset(higher_is_better) & set(names), baselines, baselines_from, notes)


def single_task_means(runs: Iterable[Run], common: tuple[tuple[str, str], ...], tasks: Sequence[str]) -> dict[str, float]:
    """Mean test metrics over the finished ``stl`` runs with these common settings; empty unless every task has one.

    Args:
        runs: Any runs, newest first.
        common: As `Run.common`.
        tasks: Names of the tasks, in the order of ``loss.main_task``.
    """
    values: dict[str, list[float]] = defaultdict(list)
    alone = [run for run in runs if run.finished and is_single_task(run) and run.common == common]
    for run in _newest(alone):
        task = tasks[int(run.settings["loss.main_task"])]
        for name, value in run.metrics.items():
            if name.partition("/")[0] == task:
                values[name].append(value)
    trained = {name.partition("/")[0] for name in values}
    return {name: statistics.fmean(numbers) for name, numbers in values.items()} if trained == set(tasks) else {}


def is_single_task(run: Run) -> bool:
    """Whether a run trains one task alone: a baseline, not a row of the table."""
    return run.loss_method == "stl"


def common_settings(runs: Iterable[Run]) -> list[tuple[tuple[str, str], ...]]:
    """The different `Run.common` of the finished runs, that of most runs first."""
    return [common for common, _ in Counter(run.common for run in runs if run.finished).most_common()]


def versus(values: Mapping[int, float], best: Mapping[int, float], *, higher_is_better: bool) -> Verdict:
    """Whether a method can be told apart from the best one: a paired bootstrap of the mean difference over common seeds.

    Args:
        values: A metric of the method, by seed.
        best: That of the best method.
        higher_is_better: Whether the metric should be large.

    Returns:
        ``alike`` if the 95 % interval of the mean difference holds zero, ``worse`` if it does not, and ``unclear`` if there
        are too few common seeds for either.
    """
    common = sorted(values.keys() & best.keys())
    sign = -1 if higher_is_better else 1
    differences = np.array([sign * (values[seed] - best[seed]) for seed in common])
    if len(common) < 2 or not np.isfinite(differences).all():
        return "unclear" if len(common) < 2 else "worse"
    if np.ptp(differences) == 0:  # every resample has this mean
        low = float(differences[0])
    else:
        resampled = stats.bootstrap(
            (differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
        )
        low = float(resampled.confidence_interval.low)
    if low <= 0:
        return "alike"
    return "worse" if len(common) >= ENOUGH_SEEDS else "unclear"


def _newest(runs: Sequence[Run]) -> list[Run]:
    """The first run of each configuration and seed."""
    first: dict[object, Run] = {}
    for run in runs:
        first.setdefault((run.loss_method, run.gradient_method, run.seed, *sorted(run.settings.items())), run)
    return list(first.values())


def _check_same_data(run: Run, other: Run) -> None:
    for key in sorted(run.settings.keys() | other.settings.keys()):
        if key.startswith("data.") and run.settings.get(key) != other.settings.get(key):
            found = f"{key}={run.settings.get(key)} and {key}={other.settings.get(key)}"
            raise ValueError(f"Only runs on the same data can be compared, but there are {found}. Choose with one of the two.")


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label: methods, and those settings that differ."""
    values: dict[str, set[str | None]] = defaultdict(set)
    for key in {key for run in runs for key in run.settings if not key.startswith(OF_METHODS)}:
        values[key] = {run.settings.get(key) for run in runs}
    differing = {key for key, found in values.items() if len(found) > 1}
    pairs: dict[tuple[str, str | None], list[Run]] = defaultdict(list)
    for run in runs:
        pairs[run.loss_method, run.gradient_method].append(run)
    groups: dict[str, list[Run]] = defaultdict(list)
    for (loss, gradient), of_pair in pairs.items():
        own = {key for run in of_pair for key in run.settings if key.startswith(OF_METHODS)}
        own = {key for key in own if len({run.settings.get(key) for run in of_pair}) > 1}
        for run in of_pair:
            chosen = [f"{key}={run.settings.get(key)}" for key in sorted(differing | own)]
            groups[" ".join([" + ".join(filter(None, (loss, gradient))), *chosen])].append(run)
    return groups


def _row(
    label: str,
    finished: Sequence[Run],
    every: Sequence[Run],
    names: Sequence[str],
    rank: float,
    plain: float,
    higher_is_better: Collection[str],
    baselines: Mapping[str, float] | None,
) -> Row:
    runs = tuple(sorted(finished, key=lambda run: run.seed))
    drops = None
    if baselines is not None:
        drops = Estimate({run.seed: delta_m(run.metrics, baselines, higher_is_better) for run in runs})
    return Row(
        label,
        runs[0].loss_method,
        runs[0].gradient_method,
        runs,
        len({run.seed for run in every} - {run.seed for run in runs}),
        {name: Estimate({run.seed: run.metrics[name] for run in runs}) for name in names},
        drops,
        rank,
        _median(run.step_ms for run in runs) / plain,
        _median(run.step_mib for run in runs),
    )


def _judged(rows: Sequence[Row], names: Sequence[str], higher_is_better: Collection[str]) -> tuple[Row, ...]:
    """Rows whose estimates have their verdicts."""
    by_name = {name: _verdicts([row.metrics[name] for row in rows], name in higher_is_better) for name in names}
    drops = _verdicts([row.delta_m for row in rows if row.delta_m is not None], larger=False)
    return tuple(
        replace(row, metrics={name: by_name[name][k] for name in names}, delta_m=drops[k] if drops else None)
        for k, row in enumerate(rows)
    )


def _verdicts(estimates: Sequence[Estimate], larger: bool) -> list[Estimate]:  # noqa: FBT001
    """The same estimates, each compared with the best."""
    costs = [_order(-estimate.mean if larger else estimate.mean) for estimate in estimates]
    if not estimates or min(costs) == math.inf:
        return list(estimates)
    best = estimates[costs.index(min(costs))]
    verdicts: list[Verdict] = [
        "best" if cost == min(costs) else versus(estimate.values, best.values, higher_is_better=larger)
        for cost, estimate in zip(costs, estimates, strict=True)
    ]
    return [replace(estimate, verdict=verdict) for estimate, verdict in zip(estimates, verdicts, strict=True)]


def _plain_step_ms(runs: Sequence[Run]) -> float:
    """Time of a step of ``ls`` without a gradient balancer; NaN if there is no such run."""
    return _median(run.step_ms for run in runs if run.loss_method == "ls" and run.gradient_method is None)


def _median(numbers: Iterable[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return statistics.median(known) if known else math.nan


def _order(cost: float) -> float:
    return math.inf if math.isnan(cost) else cost


def _notes(rows: Sequence[Row], failed: Sequence[str]) -> tuple[str, ...]:
    notes = [f"No run of {label} finished." for label in failed]
    every = sorted({seed for row in rows for seed in row.seeds})
    for row in rows:
        missing = [seed for seed in every if seed not in row.seeds]
        if missing:
            cause = f" ({row.failed} failed)" if row.failed else ""
            notes.append(f"{row.label} lacks seed {', '.join(map(str, missing))}{cause}.")
        broken = [name for name, estimate in row.metrics.items() if math.isnan(estimate.mean)]
        if broken:
            notes.append(f"{row.label} has NaN for {', '.join(broken)} in at least one seed, so its mean is not a number.")
    if 1 < len(every) < ENOUGH_SEEDS:
        share = 200 / 2 ** len(every)
        notes.append(
            f"{len(every)} seeds are too few to call a method worse than the best: if two are equal, all {len(every)} paired "
            f"differences still have one sign in {share:.3g} % of cases. From {ENOUGH_SEEDS} seeds on it is less than 5 %."
        )
    if len(every) == 1:
        notes.append("One seed is too few: nothing can be said of the spread. Use --seeds=6 or more.")
    return tuple(notes)
