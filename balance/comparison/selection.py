"""Recorded runs to compare: selected by id and by settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..messages import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .recorded_run import RecordedRun
    from .store import Store


def select_runs(
    store: Store, recorded: Sequence[RecordedRun], run_ids: Sequence[str], filters: Mapping[str, str]
) -> list[RecordedRun]:
    """Return the runs to compare, without single-task networks.

    Args:
        store: Store of the runs.
        recorded: All runs in the store.
        run_ids: Ids of runs or of sweeps; none for all runs.
        filters: Settings that the runs must have, as they are recorded.

    Raises:
        ValueError: If an id or a setting is unknown, or no finished run is left.
    """
    runs = [run for run in (store.chosen(run_ids) if run_ids else recorded) if not run.is_single_task]
    for key, value in filters.items():
        runs = [run for run in runs if _equal(_setting(run, key, recorded), value)]
    if not any(run.finished for run in runs):
        condition = f" with {', '.join(f'{key}={value}' for key, value in filters.items())}" if filters else ""
        raise ValueError(f"No finished runs of '{store.experiment}'{condition} in {store.place}. Train some first.")
    return runs


def split_runs(runs: Sequence[RecordedRun], key: str, recorded: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """Return the runs by the value of a setting, for the values of finished runs, numbers in ascending order.

    Args:
        runs: Runs to split.
        key: The setting.
        recorded: All runs in the store.

    Raises:
        ValueError: If no run has the setting.
    """
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        groups.setdefault(str(_setting(run, key, recorded)), []).append(run)
    finished = [value for value, group in groups.items() if any(run.finished for run in group)]
    return {value: groups[value] for value in sorted(finished, key=_numeric_order)}


def _numeric_order(value: str) -> tuple[float, str]:
    try:
        return float(value), ""
    except ValueError:
        return 0.0, value


def _equal(recorded: str | None, value: str) -> bool:
    """Return whether two values are equal as numbers or as words: ``1`` equals ``1.0``."""
    try:
        return recorded == value or (recorded is not None and float(recorded) == float(value))
    except ValueError:
        return False


def _setting(run: RecordedRun, key: str, recorded: Sequence[RecordedRun]) -> str | None:
    special = {
        "loss_method": run.loss_method,
        "gradient_method": str(run.gradient_method),
        "seed": str(run.seed),
        "configuration": run.configuration,
    }
    if key not in special and not any(key in other.settings for other in recorded):
        raise ValueError(unknown("setting", key, {*special, *(key for other in recorded for key in other.settings)}))
    return special.get(key, run.settings.get(key))
