"""Recorded runs grouped into the rows of a table, and the labels of the rows."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .recorded_run import METHOD_GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .recorded_run import RecordedRun


def newest_runs(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the first run of each configuration and seed."""
    newest: dict[object, RecordedRun] = {}
    for run in runs:
        newest.setdefault((*_configuration(run), run.seed), run)
    return list(newest.values())


def check_same_data(runs: Sequence[RecordedRun]) -> None:
    """Check that all runs have the same data.

    Raises:
        ValueError: If an entry ``data.*`` differs.
    """
    keys = {key for run in runs for key in run.settings if key.startswith("data.")}
    for key in sorted(keys):
        first, *others = dict.fromkeys(run.settings.get(key) for run in runs)
        if others:
            raise ValueError(
                f"Compared runs must have the same data, but got {key}={others[0]} and {key}={first}. Select one of them, or "
                f"make a table of each with compare.py --per={key}."
            )


def group_by_label(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Return the runs of each row by the label of the row.

    The label of a named configuration is its name, with the settings that differ between its runs. All other labels are the
    methods, with the settings that differ between rows.
    """
    names = _names(runs)
    different = _different_settings(runs, methods=False)
    kinds: dict[tuple[str, str], list[RecordedRun]] = defaultdict(list)
    for run in runs:
        kinds[names.get(_configuration(run), ""), method_label(run.loss_method, run.gradient_method)].append(run)
    groups: dict[str, list[RecordedRun]] = defaultdict(list)
    for (name, methods), of_kind in kinds.items():
        shown = _different_settings(of_kind, methods=True)
        shown |= _different_settings(of_kind, methods=False) if name else different
        ambiguous = sum(other == name for other, _ in kinds) > 1
        start = (f"{name} ({methods})" if ambiguous else name) if name else methods
        for run in of_kind:
            groups[" ".join([start, *(f"{key}={run.settings.get(key)}" for key in sorted(shown))])].append(run)
    return groups


def method_label(loss_method: str, gradient_method: str | None) -> str:
    """Return the name of a pair of methods in tables."""
    return " + ".join(filter(None, (loss_method, gradient_method)))


def _names(runs: Iterable[RecordedRun]) -> dict[tuple[object, ...], str]:
    """Return the newest name of each configuration that has a name."""
    names: dict[tuple[object, ...], str] = {}
    for run in runs:
        if run.configuration:
            names.setdefault(_configuration(run), run.configuration)
    return names


def _configuration(run: RecordedRun) -> tuple[object, ...]:
    """Return everything that decides the result except the seed."""
    return (run.loss_method, run.gradient_method, run.task, *sorted(run.settings.items()))


def _different_settings(runs: Iterable[RecordedRun], *, methods: bool) -> set[str]:
    """Return the settings that differ between runs: of the methods, or all others."""
    values: dict[str, set[str | None]] = defaultdict(set)
    for key in {key for run in runs for key in run.settings if key.startswith(METHOD_GROUPS) == methods}:
        values[key] = {run.settings.get(key) for run in runs}
    return {key for key, different in values.items() if len(different) > 1}
