"""What networks reach that learn one task alone: the numbers that delta_m compares with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from experiments.analysis import published_tables as published
from experiments.analysis.comparison import common_settings, single_task_means
from experiments.problems import base as experiments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from experiments.analysis.comparison import Run

Settings = tuple[tuple[str, str], ...]  # as Run.common
KIND = ("protocol", "data.source")  # settings without which numbers mean something else


class Reference(NamedTuple):
    """Single-task value of each metric, and where it is from, in words."""

    metrics: dict[str, float]
    origin: str


def read_file(file: Path) -> tuple[Reference, dict[str, str]]:
    """The numbers of a baselines file, and the settings they were measured with.

    Raises:
        ValueError: If it is not there, or not such a file.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        metrics = {name: float(row["mean"]) for name, row in content["metrics"].items()}
        settings = {key: str(value) for key, value in content.get("settings", {}).items()}
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} must be a file as experiments/baselines.py writes it, but: {error}") from None
    return Reference(metrics, f"the file {file.name} of single-task networks"), settings


def shipped(experiment: str) -> tuple[Reference, dict[str, str]] | None:
    """What is in the experiment's own ``baselines.yaml``; None where it has none."""
    file = experiments.FOLDER / experiment / "baselines.yaml"
    return read_file(file) if file.exists() else None


def shipped_for(experiment: str, common: Settings) -> Reference | None:
    """What the experiment's own file has for these settings; None if it was measured with others."""
    own = shipped(experiment)
    return own[0] if own is not None and dict(common) == own[1] else None


def of_paper(experiment: str, common: Settings) -> Reference | None:
    """The published single-task numbers, for runs of the published protocol on the data set itself; else None."""
    settings = dict(common)
    on_disk = experiments.find(experiment).ON_DISK
    if settings.get("protocol") != "paper" or settings.get("data.source") != on_disk or experiment not in published.names():
        return None
    fitting = [table for table in published.of(experiment) if not table.differences(settings)]
    table = fitting[0] if fitting else published.load(experiment)
    metrics = {name.lower(): table.factors[name] * value for name, value in table.baselines.items()}
    return Reference(metrics, "the published single-task networks") if metrics else None


def for_run(experiment: str, common: Settings) -> Reference | None:
    """What a run can be compared with while it trains, without a look at other runs.

    The experiment's own numbers also hold where settings such as the number of epochs differ, and say so; but not for other
    data, another network or another protocol.
    """
    own = shipped(experiment)
    if own is None:
        return of_paper(experiment, common)
    found, settings = own
    if any(value != settings.get(key) for key, value in common if key in KIND or key.startswith("model.")):
        return of_paper(experiment, common)
    remark = "" if settings == dict(common) else ", which were measured with other settings"
    return found._replace(origin=f"single-task baselines{remark}")


def find(experiment: str, common: Settings, runs: Iterable[Run]) -> Reference | None:
    """Numbers that were measured with the same settings: of the experiment's file, else of recorded runs, else of the papers.

    Args:
        experiment: Its name.
        common: Settings that do not belong to the methods.
        runs: Recorded runs, newest first.
    """
    own = shipped_for(experiment, common)
    if own is not None:
        return own
    alone = single_task_means(runs, common, experiments.find(experiment).TASKS)
    return Reference(alone, "the recorded runs of single-task networks") if alone else of_paper(experiment, common)


def for_table(experiment: str, compared: Sequence[Run], every: Sequence[Run]) -> Reference:
    """The one reference of a table: for the settings that most of its runs have, among those that have one.

    Args:
        experiment: Its name.
        compared: Runs of the table.
        every: All recorded runs, newest first.

    Raises:
        ValueError: If there are no single-task networks with any of the settings.
    """
    candidates = common_settings(compared)
    for common in candidates:
        reference = find(experiment, common, every)
        if reference is not None:
            return (
                reference
                if len(candidates) == 1
                else reference._replace(origin=f"{reference.origin} ({_differing(common, candidates)})")
            )
    raise ValueError(
        "delta_m needs single-task networks with the settings of the compared runs, but there are none for "
        f"{_shown(candidates[0], experiment)}. sweep.py measures them; or give --baselines=FILE, or --baselines=none for a "
        "table without delta_m."
    )


def _differing(common: Settings, candidates: Sequence[Settings]) -> str:
    return ", ".join(f"{key}={value}" for key, value in common if any(dict(other).get(key) != value for other in candidates))


def _shown(common: Settings, experiment: str) -> str:
    """The settings that differ from those of the experiment's own file; all where it has none."""
    own: Mapping[str, str] = {} if (found := shipped(experiment)) is None else found[1]
    return ", ".join(f"{key}={value}" for key, value in common if own.get(key) != value) or "its defaults"
