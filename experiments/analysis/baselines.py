"""Metrics of networks that were trained on one task only: delta_m compares with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from balance.comparison.recorded_run import METHOD_GROUPS
from balance.comparison.single_task import Baselines, most_common_settings, single_task_means
from balance.comparison.store import complete
from experiments.analysis import published_tables
from experiments.problems import base as problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from balance.comparison.recorded_run import RecordedRun, Settings

DATA_AND_PROTOCOL = ("protocol", "data.source")  # baselines with other values of these settings are never used


class BaselinesFile(NamedTuple):
    """Content of a file that ``experiments/baselines.py`` wrote."""

    baselines: Baselines
    settings: dict[str, str]


def read_file(file: Path) -> BaselinesFile:
    """Read a file of baselines.

    Returns:
        Baselines, and the settings of their runs.

    Raises:
        ValueError: If the file does not exist, or has another form.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        metrics = {name: float(row["mean"]) for name, row in content["metrics"].items()}
        recorded = {key: str(value) for key, value in content.get("settings", {}).items()}
        settings = {key: value for key, value in complete(recorded).items() if not key.startswith(METHOD_GROUPS)}
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} must be a file as experiments/baselines.py writes it, but: {error}") from None
    return BaselinesFile(Baselines(metrics, f"the file {file.name} of single-task networks"), settings)


def shipped(experiment: str) -> BaselinesFile | None:
    """Return the content of the experiment's ``baselines.yaml``; None without such a file."""
    file = problems.FOLDER / experiment / "baselines.yaml"
    return read_file(file) if file.exists() else None


def published(experiment: str, common: Settings) -> Baselines | None:
    """Return the published single-task metrics for runs of the published protocol on the official data; else None."""
    settings = dict(common)
    official = problems.find(experiment).ON_DISK
    if settings.get("protocol") != "paper" or settings.get("data.source") != official:
        return None
    if experiment not in published_tables.names():
        return None
    same_settings = [t for t in published_tables.for_experiment(experiment) if not t.differences(settings)]
    table = same_settings[0] if same_settings else published_tables.load(experiment)
    metrics = {name.lower(): table.factors[name] * value for name, value in table.baselines.items()}
    return Baselines(metrics, "the published single-task networks") if metrics else None


def for_run(experiment: str, common: Settings) -> Baselines | None:
    """Return the baselines that a run is compared with while it trains, without access to other runs.

    The experiment's own file is also used where settings such as the number of epochs differ, which the origin then states. It
    is not used for other data, another network or another protocol.
    """
    file = shipped(experiment)
    if file is None or _is_other_problem(common, file.settings):
        return published(experiment, common)
    remark = "" if file.settings == dict(common) else ", which were measured with other settings"
    return file.baselines._replace(origin=f"single-task baselines{remark}")


def _is_other_problem(common: Settings, settings: dict[str, str]) -> bool:
    return any(value != settings.get(key) for key, value in common if key in DATA_AND_PROTOCOL or key.startswith("model."))


def with_settings(experiment: str, common: Settings, runs: Iterable[RecordedRun]) -> Baselines | None:
    """Return baselines with exactly these settings: from the experiment's file, else from recorded runs, else from papers.

    Args:
        experiment: Name of the experiment.
        common: Settings that do not belong to the methods.
        runs: Recorded runs, newest first.
    """
    file = shipped(experiment)
    if file is not None and dict(common) == file.settings:
        return file.baselines
    runs = list(runs)
    means = single_task_means(runs, common, _tasks(experiment, common, runs))
    if means:
        return Baselines(means, "the recorded runs of single-task networks")
    return published(experiment, common)


def _tasks(experiment: str, common: Settings, runs: Iterable[RecordedRun]) -> tuple[str, ...]:
    """Return the tasks of the runs with these settings: of the problem, or of the metrics where the data decide the tasks."""
    problem = problems.find(experiment)
    if problem.task_names is None:
        return problem.TASKS
    return tuple(dict.fromkeys(name.partition("/")[0] for run in runs if run.common == common for name in run.metrics))


def for_table(experiment: str, compared: Sequence[RecordedRun], recorded: Sequence[RecordedRun]) -> Baselines:
    """Return the baselines of a table: for the settings that most of its runs have, among the settings with baselines.

    Args:
        experiment: Name of the experiment.
        compared: Runs of the table.
        recorded: All recorded runs, newest first.

    Raises:
        ValueError: If no single-task networks have any of the settings.
    """
    candidates = most_common_settings(compared)
    for common in candidates:
        baselines = with_settings(experiment, common, recorded)
        if baselines is not None and len(candidates) == 1:
            return baselines
        if baselines is not None:
            return baselines._replace(origin=f"{baselines.origin} ({_different(common, candidates)})")
    raise ValueError(
        "delta_m needs single-task networks with the settings of the compared runs, but none have "
        f"{_remarkable(candidates[0], experiment)}. Measure them with sweep.py, or give --baselines=FILE, or --baselines=none "
        "for a table without delta_m."
    )


def _different(common: Settings, candidates: Sequence[Settings]) -> str:
    return ", ".join(f"{key}={value}" for key, value in common if any(dict(other).get(key) != value for other in candidates))


def _remarkable(common: Settings, experiment: str) -> str:
    """Return the settings that differ from the settings in the experiment's file; all settings without a file."""
    file = shipped(experiment)
    known = {} if file is None else file.settings
    return ", ".join(f"{key}={value}" for key, value in common if known.get(key) != value) or "its defaults"
