"""Recorded runs grouped into the rows of a table, and the labels of the rows."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from experiments.recording.recorded_run import METHOD_GROUPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from experiments.recording.recorded_run import RecordedRun


def newest_runs(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Return the first run of each configuration and seed."""
    newest: dict[object, RecordedRun] = {}
    for run in runs:
        newest.setdefault((run.loss_method, run.gradient_method, run.seed, *sorted(run.settings.items())), run)
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
                f"Compared runs must have the same data, but got {key}={others[0]} and {key}={first}. Select one of the two."
            )


def group_by_label(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Return the runs of each row by the label of the row: its methods, and the settings that differ between rows."""
    different = _different_settings(runs, methods=False)
    pairs: dict[tuple[str, str | None], list[RecordedRun]] = defaultdict(list)
    for run in runs:
        pairs[run.loss_method, run.gradient_method].append(run)
    groups: dict[str, list[RecordedRun]] = defaultdict(list)
    for (loss, gradient), of_pair in pairs.items():
        shown = sorted(different | _different_settings(of_pair, methods=True))
        for run in of_pair:
            settings = [f"{key}={run.settings.get(key)}" for key in shown]
            groups[" ".join([method_label(loss, gradient), *settings])].append(run)
    return groups


def method_label(loss_method: str, gradient_method: str | None) -> str:
    """Return the name of a pair of methods in tables."""
    return " + ".join(filter(None, (loss_method, gradient_method)))


def _different_settings(runs: Iterable[RecordedRun], *, methods: bool) -> set[str]:
    """Return the settings that differ between runs, only those of the methods or only all others."""
    values: dict[str, set[str | None]] = defaultdict(set)
    for key in {key for run in runs for key in run.settings if key.startswith(METHOD_GROUPS) == methods}:
        values[key] = {run.settings.get(key) for run in runs}
    return {key for key, different in values.items() if len(different) > 1}
