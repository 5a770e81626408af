"""A table of recorded runs: one row for each pair of methods, with means over seeds, ranks and verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ..metrics import delta_m, mean_rank
from .grouping import check_same_data, group_by_label, newest_runs
from .statistics import ENOUGH_SEEDS, Estimate, compare_with_best, median

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from .recorded_run import RecordedRun
    from .statistics import Verdict


SUMMARY = "all/"  # beginning of the names of metrics of all tasks together, which have no rank and no part in delta_m


@dataclass(frozen=True)
class Row:
    """A pair of methods, with the settings that distinguish it from other rows.

    Attributes:
        label: Name of the row.
        loss_method: Name.
        gradient_method: Name, or None.
        runs: Finished runs, one for each seed.
        failed: Number of seeds without a finished run.
        metrics: Test metrics by ``<task>/<metric>``.
        delta_m: In percent; None without baselines.
        mean_rank: Among the rows of the table, 1 is best.
        time: Time of a step relative to ``ls``; NaN if it was not measured.
        memory: Memory of a step in MiB; NaN if it was not measured.
    """

    label: str
    loss_method: str
    gradient_method: str | None
    runs: tuple[RecordedRun, ...]
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
class RunTable:
    """A table of rows, best delta_m first; without baselines, the best of all tasks together, or the best mean rank.

    Attributes:
        experiment: Name of the experiment.
        rows: At least one.
        metrics: Names of the columns, ``<task>/<metric>``.
        higher_is_better: Metrics that should be large.
        baselines: Single-task value of each metric; None for a table without delta_m.
        baselines_from: Origin of the baselines, in words.
        notes: Limits of the table, in sentences: missing or failed seeds, settings that differ.
        title: Text above the table; empty for none.
    """

    experiment: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    higher_is_better: frozenset[str]
    baselines: Mapping[str, float] | None = None
    baselines_from: str = ""
    notes: tuple[str, ...] = field(default=())
    title: str = ""


class _Metrics(NamedTuple):
    """Facts about the metrics of a table that all rows share."""

    names: tuple[str, ...]
    higher_is_better: Collection[str]
    baselines: Mapping[str, float] | None

    @property
    def of_tasks(self) -> tuple[str, ...]:
        """Names of the metrics of single tasks; of all metrics if there are no others."""
        return tuple(name for name in self.names if not name.startswith(SUMMARY)) or self.names


def main_summary(names: Collection[str]) -> str | None:
    """Return the metric of all tasks together that single tasks have as well, or else the first one; None if there is none.

    Stores return metrics in different orders, so the order decides only where nothing else does.
    """
    of_tasks = {name.partition("/")[2] for name in names if not name.startswith(SUMMARY)}
    summaries = [name for name in names if name.startswith(SUMMARY)]
    return next((name for name in summaries if name.removeprefix(SUMMARY) in of_tasks), next(iter(summaries), None))


def tabulate(
    runs: Sequence[RecordedRun],
    *,
    experiment: str,
    higher_is_better: Collection[str],
    baselines: Mapping[str, float] | None,
    baselines_from: str = "",
    title: str = "",
) -> RunTable:
    """Return the table of some runs.

    Args:
        runs: Newest first. Of several finished runs with equal methods, settings and seed the newest counts.
        experiment: Name of the experiment.
        higher_is_better: Names of the metrics that should be large.
        baselines: Single-task value of each metric; None for a table without delta_m.
        baselines_from: Origin of the baselines, in words.
        title: Text above the table.

    Raises:
        ValueError: If no run is finished, two runs have different data, or a baseline is missing or zero.
    """
    finished = newest_runs([run for run in runs if run.finished])
    if not finished:
        raise ValueError(f"No finished runs of '{experiment}' to compare.")
    check_same_data(finished)
    names = tuple(dict.fromkeys(name for run in finished for name in run.metrics))
    names = tuple(dict.fromkeys(filter(None, (main_summary(names), *sorted(names, key=lambda name: name.startswith(SUMMARY))))))
    finished = [replace(run, metrics={name: run.metrics.get(name, math.nan) for name in names}) for run in finished]
    groups = group_by_label([*finished, *newest_runs([run for run in runs if not run.finished])])
    rows = _judged(_rows(groups, _Metrics(names, higher_is_better, baselines)), higher_is_better)
    notes = _notes(rows, [label for label, group in groups.items() if not any(run.finished for run in group)])
    higher = frozenset(higher_is_better) & set(names)
    return RunTable(experiment, rows, names, higher, baselines, baselines_from, notes, title)


def _rows(groups: Mapping[str, Sequence[RecordedRun]], metrics: _Metrics) -> list[Row]:
    """Return a row for each group with a finished run, in the order of the table."""
    finished = {label: [run for run in group if run.finished] for label, group in groups.items()}
    finished = {label: group for label, group in finished.items() if group}
    means = {label: {name: _estimate(group, name).mean for name in metrics.of_tasks} for label, group in finished.items()}
    ranks = mean_rank(means, metrics.higher_is_better)
    plain = _plain_step_ms(run for group in finished.values() for run in group)
    rows = [_row(label, group, metrics) for label, group in finished.items()]
    rows = [
        replace(row, mean_rank=ranks[row.label], time=row.time / plain, failed=_failed_seeds(groups[row.label], row))
        for row in rows
    ]
    return sorted(rows, key=lambda row: (_cost(_main_result(row, metrics)), row.mean_rank, row.label))


def _main_result(row: Row, metrics: _Metrics) -> float:
    """Return the number by which the rows are sorted; a smaller one is better."""
    summary = main_summary(metrics.names)
    if row.delta_m is not None or summary is None:
        return row.mean_rank if row.delta_m is None else row.delta_m.mean
    return -row.metrics[summary].mean if summary in metrics.higher_is_better else row.metrics[summary].mean


def _row(label: str, finished: Sequence[RecordedRun], metrics: _Metrics) -> Row:
    """Return a row from its finished runs only; time is in milliseconds."""
    runs = tuple(sorted(finished, key=lambda run: run.seed))
    drops = None
    if metrics.baselines is not None:
        baselines, of_tasks = metrics.baselines, metrics.of_tasks
        values = {run.seed: {name: run.metrics[name] for name in of_tasks} for run in runs}
        drops = Estimate({seed: delta_m(ours, baselines, metrics.higher_is_better) for seed, ours in values.items()})
    return Row(
        label,
        runs[0].loss_method,
        runs[0].gradient_method,
        runs,
        failed=0,
        metrics={name: _estimate(runs, name) for name in metrics.names},
        delta_m=drops,
        mean_rank=math.nan,
        time=median(run.step_ms for run in runs),
        memory=median(run.step_mib for run in runs),
    )


def _estimate(runs: Iterable[RecordedRun], name: str) -> Estimate:
    return Estimate({run.seed: run.metrics[name] for run in runs})


def _failed_seeds(group: Sequence[RecordedRun], row: Row) -> int:
    return len({run.seed for run in group} - set(row.seeds))


def _plain_step_ms(runs: Iterable[RecordedRun]) -> float:
    """Return the time of a step of ``ls`` without a gradient balancer; NaN without such a run."""
    return median(run.step_ms for run in runs if run.loss_method == "ls" and run.gradient_method is None)


def _judged(rows: Sequence[Row], higher_is_better: Collection[str]) -> tuple[Row, ...]:
    """Return the rows with a verdict for each estimate."""
    columns = {
        name: _with_verdicts([row.metrics[name] for row in rows], higher_is_better=name in higher_is_better)
        for name in rows[0].metrics
    }
    drops = _with_verdicts([row.delta_m for row in rows if row.delta_m is not None], higher_is_better=False)
    return tuple(
        replace(row, metrics={name: column[k] for name, column in columns.items()}, delta_m=drops[k] if drops else None)
        for k, row in enumerate(rows)
    )


def _with_verdicts(estimates: Sequence[Estimate], *, higher_is_better: bool) -> list[Estimate]:
    """Return the estimates of a column, each compared with the best."""
    costs = [_cost(-estimate.mean if higher_is_better else estimate.mean) for estimate in estimates]
    if not estimates or min(costs) == math.inf:
        return list(estimates)
    best = estimates[costs.index(min(costs))]
    verdicts: list[Verdict] = [
        "best" if cost == min(costs) else compare_with_best(estimate.values, best.values, higher_is_better=higher_is_better)
        for cost, estimate in zip(costs, estimates, strict=True)
    ]
    return [replace(estimate, verdict=verdict) for estimate, verdict in zip(estimates, verdicts, strict=True)]


def _cost(number: float) -> float:
    """Return a number for sorting, NaN last."""
    return math.inf if math.isnan(number) else number


def _notes(rows: Sequence[Row], failed: Sequence[str]) -> tuple[str, ...]:
    """Return sentences about rows without finished runs, missing seeds, NaN and few seeds."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    notes = [f"No run of {label} finished." for label in failed]
    for row in rows:
        missing = [seed for seed in seeds if seed not in row.seeds]
        if missing:
            cause = f" ({row.failed} failed)" if row.failed else ""
            notes.append(f"{row.label} lacks seed {', '.join(map(str, missing))}{cause}.")
        broken = [name for name, estimate in row.metrics.items() if math.isnan(estimate.mean)]
        if broken:
            notes.append(f"{row.label} has NaN for {', '.join(broken)} in at least one seed, so its mean is not a number.")
    return (*notes, *_notes_on_seeds(len(seeds)))


def _notes_on_seeds(seeds: int) -> list[str]:
    if seeds == 1:
        return ["One seed is too few to estimate a spread. Use --seeds=6 or more."]
    if seeds >= ENOUGH_SEEDS:
        return []
    return [
        f"{seeds} seeds are too few to call a method worse than the best: if two are equal, all {seeds} paired "
        f"differences still have one sign in {200 / 2**seeds:.3g} % of cases. From {ENOUGH_SEEDS} seeds on it is less than 5 %."
    ]
