"""The runs that a sweep consists of, and which of them are finished."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from balance.comparison.recorded_run import METHOD_GROUPS
from balance.comparison.store import Store
from experiments.analysis import baselines
from experiments.problems import base as problems
from experiments.recording.fingerprint import common_of
from experiments.sweeps.job import make_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from balance.comparison.recorded_run import RecordedRun
    from experiments.sweeps.job import Job


@dataclass(frozen=True)
class Configuration:
    """One way to train.

    Attributes:
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or ``"none"``.
        overrides: Further entries of the trainer's configuration.
        name: Name in tables; empty for the names of the methods.
    """

    loss_method: str
    gradient_method: str
    overrides: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Sweep:
    """A grid of runs: every configuration with every cell and every seed.

    Attributes:
        configurations: Ways to train.
        seeds: Seeds of each configuration.
        overrides: Overrides for all runs.
        cells: Combinations of overrides, each for all configurations.
        with_baselines: Whether single-task networks are trained if they are missing.
    """

    configurations: tuple[Configuration, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...] = ((),)
    with_baselines: bool = True


def plan(sweep: Sweep, *, create: bool) -> list[Job]:
    """Return the runs of a sweep, missing single-task baselines first.

    Args:
        sweep: The grid.
        create: Whether a missing tracking store is created.

    Raises:
        ValueError: If the configuration of any run is wrong; nothing has run then.
        OSError: If the tracking store cannot be used.
    """
    grid = grid_jobs(sweep)
    recorded = recorded_runs(grid[0].config, create=create)
    single_task = [
        job
        for cell in (sweep.cells if sweep.with_baselines else ())
        for job in missing_baselines([*sweep.overrides, *cell], sweep.seeds, cell)
    ]
    finished = {run.fingerprint for run in recorded if run.finished}
    jobs = {job.fingerprint: job for job in (*single_task, *grid)}  # a baseline may be in the grid too
    return [job.with_state(finished) for job in jobs.values()]


def grid_jobs(sweep: Sweep) -> list[Job]:
    """Return the runs of a sweep without baselines.

    Raises:
        ValueError: If the configuration of any run is wrong, or two configurations are equal.
    """
    names: dict[str, str] = {}
    jobs = []
    for cell, configuration, seed in itertools.product(sweep.cells, sweep.configurations, sweep.seeds):
        methods = [f"loss_method={configuration.loss_method}", f"gradient_method={configuration.gradient_method}"]
        overrides = [*methods, f"seed={seed}", *sweep.overrides, *configuration.overrides, *cell]
        job = make_job(overrides, configuration.name, cell)
        other = names.setdefault(job.fingerprint, configuration.name)
        if other != configuration.name:
            raise ValueError(f"Configurations must differ, but '{other}' and '{configuration.name}' are equal. Remove one.")
        jobs.append(job)
    return jobs


def recorded_runs(config: DictConfig, *, create: bool) -> list[RecordedRun]:
    """Return the runs that have ended, newest first; none without tracking.

    Raises:
        OSError: If the tracking store cannot be used.
    """
    try:
        return Store(config.experiment, config.output_dir, create=create).runs() if config.track else []
    except FileNotFoundError:
        return []


def missing_baselines(overrides: Sequence[str], seeds: Sequence[int], cell: tuple[str, ...] = ()) -> list[Job]:
    """Return the single-task runs with these overrides; none if baselines exist for them, or the problem has none."""
    config = make_job(_single_task_overrides(overrides, 0, seeds[0])).config
    if not problems.find(config.experiment).SINGLE_TASK_BASELINES:
        return []
    known = baselines.with_settings(config.experiment, common_of(config), ())
    return baseline_jobs(overrides, seeds, cell) if known is None else []


def baseline_jobs(overrides: Sequence[str], seeds: Sequence[int], cell: tuple[str, ...] = ()) -> list[Job]:
    """Return a single-task run for each task and seed, without the overrides that belong to methods.

    Args:
        overrides: Overrides of the trainer.
        seeds: Seeds of each task.
        cell: Those of the overrides that labels show.

    Raises:
        ValueError: If the problem has no single-task baselines.
    """
    first = make_job(_single_task_overrides(overrides, 0, seeds[0]))
    name = first.config.experiment
    if not problems.find(name).SINGLE_TASK_BASELINES:
        raise ValueError(
            f"The experiment must have tasks that can be learned on their own, but '{name}' has no single-task baselines. "
            "compare.py makes its tables without delta_m."
        )
    tasks = range(len(problems.tasks_of(first.config)))
    return [make_job(_single_task_overrides(overrides, k, seed), cell=cell) for k, seed in itertools.product(tasks, seeds)]


def _single_task_overrides(overrides: Sequence[str], task: int, seed: int) -> list[str]:
    common = [override for override in overrides if not override.startswith(METHOD_GROUPS)]
    return ["loss_method=stl", f"loss.main_task={task}", f"seed={seed}", *common]
