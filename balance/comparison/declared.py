"""Directions and baselines that recorded runs declare, and checks that the runs can be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .grouping import method_label, newest_runs
from .single_task import Baselines, most_common_settings, single_task_means

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from .recorded_run import RecordedRun

T = TypeVar("T")


def check_metrics(runs: Sequence[RecordedRun]) -> None:
    """Check that all finished runs have the same final metrics; an earlier run with equal methods and seed does not count.

    Args:
        runs: Runs to compare, newest first.

    Raises:
        ValueError: If a run has no final metrics, or lacks a metric of another run.
    """
    finished = newest_runs([run for run in runs if run.finished])
    for run in finished:
        if not run.metrics:
            raise ValueError(
                f"Compared runs must have final metrics, but {_label(run)} has none. Record them with tracker.log_final(...), "
                "or leave the run out."
            )
    names = dict.fromkeys(name for run in finished for name in run.metrics)
    for run in finished:
        if missing := [name for name in names if name not in run.metrics]:
            raise ValueError(
                f"Compared runs must have the same final metrics, but {_label(run)} lacks {', '.join(missing)}. Leave the run "
                "out, or record all metrics of every run."
            )


def directions(runs: Sequence[RecordedRun], default: Collection[str] | None = None) -> frozenset[str]:
    """Return the names of the metrics that should be large.

    Args:
        runs: Runs to compare.
        default: Names for runs that declare none, such as the names that a problem declares; None without a default.

    Raises:
        ValueError: If a finished run declares none and there is no default, or two runs disagree.
    """
    known = None if default is None else frozenset(default)
    finished = [run for run in runs if run.finished]
    for run in finished:
        if run.higher_is_better is None and known is None:
            raise ValueError(
                f"Compared runs must declare the metrics that should be large, but {_label(run)} does not. Use "
                "Tracker(..., higher_is_better=...), or give higher_is_better to balance.compare."
            )
    completed = [run if run.higher_is_better is not None else replace(run, higher_is_better=known) for run in finished]
    return _agreed(completed, "higher_is_better", lambda run: run.higher_is_better) or frozenset()


def declared_baselines(runs: Iterable[RecordedRun]) -> Baselines | None:
    """Return the single-task values that the finished runs declare; None if no run does.

    Raises:
        ValueError: If two runs declare different values.
    """
    declared = _agreed([run for run in runs if run.finished], "baselines", lambda run: run.baselines)
    return None if declared is None else Baselines(dict(declared), "as the runs declare them")


def recorded_baselines(compared: Sequence[RecordedRun], recorded: Sequence[RecordedRun]) -> Baselines | None:
    """Return means of the recorded single-task runs, for the settings that most of the compared runs have.

    Args:
        compared: Runs to compare.
        recorded: All recorded runs, newest first.

    Returns:
        The baselines; None unless every task has a single-task run with such settings.
    """
    tasks = tuple(dict.fromkeys(name.partition("/")[0] for run in compared for name in run.metrics))
    for common in most_common_settings(compared):
        if means := single_task_means(recorded, common, tasks):
            return Baselines(means, "the recorded runs of single-task networks")
    return None


def remark_on_missing_baselines(recorded: Iterable[RecordedRun]) -> str:
    """Return a sentence with the reason why a table has no delta_m."""
    if any(run.is_single_task and run.finished for run in recorded):
        return (
            "No delta_m: the recorded single-task runs have other settings than the compared runs, or do not cover all their "
            "tasks."
        )
    return "No delta_m: no baselines are declared, and no single-task runs are recorded."


def _agreed(runs: Iterable[RecordedRun], name: str, value_of: Callable[[RecordedRun], T | None]) -> T | None:
    """Return the value of all runs that have one; None without such a run.

    Raises:
        ValueError: If two runs have different values.
    """
    first: tuple[RecordedRun, T] | None = None
    for run in runs:
        value = value_of(run)
        if value is None:
            continue
        if first is not None and value != first[1]:
            raise ValueError(
                f"Compared runs must declare equal {name}, but {_label(first[0])} and {_label(run)} differ. Give {name} to "
                "balance.compare, or leave some runs out."
            )
        first = first or (run, value)
    return None if first is None else first[1]


def _label(run: RecordedRun) -> str:
    return f"run {run.run_id} ({method_label(run.loss_method, run.gradient_method)}, seed {run.seed})"
