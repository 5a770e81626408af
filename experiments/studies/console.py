"""Printed plan of a study."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

from experiments.studies.choice import recorded_fingerprints
from experiments.studies.execution import first_jobs
from experiments.studies.trials import trials
from experiments.sweeps.console import in_words
from experiments.sweeps.runtime import estimate_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.studies.study_file import ProblemEntry, Study


def show_plan(study: Study, further: tuple[str, ...], workers: int, console: Console, *, timed: bool) -> None:
    """Print the number of runs on each problem, and of finished trials.

    Args:
        study: The study.
        further: Entries of the trainer's configuration for all runs.
        workers: Runs at a time.
        console: Console to print to.
        timed: Whether some steps of each method are timed, which takes minutes, and the time of all runs is printed.
    """
    table = Table("problem", "single-task", "trials", "chosen, all seeds", "finished of the first two", "time", title="study")
    total = 0.0
    for name, problem in study.problems.items():
        jobs = first_jobs(study, problem, further)
        baselines, chosen = sum(job.is_baseline for job in jobs), study.seeds * len(study.methods)
        recorded = recorded_fingerprints(jobs[0])
        finished = sum(job.fingerprint in recorded for job in jobs)
        seconds = seconds_of_problem(study, problem, further, workers) if timed else math.nan
        total += seconds
        cells = (baselines, len(jobs) - baselines, chosen, finished)
        table.add_row(name, *map(str, cells), "-" if math.isnan(seconds) else in_words(seconds))
    console.print(table)
    if timed:
        console.print(f"about {in_words(total)} with {workers} at a time, if nothing is finished")


def seconds_of_problem(study: Study, problem: ProblemEntry, further: tuple[str, ...], workers: int) -> float:
    """Return the time of all runs on a problem in seconds, from some steps of each method."""
    runs = len(study.rates) + study.seeds
    methods = [trials(study, name, problem, further)[0] for name in study.methods]
    single = [job for job in first_jobs(study, problem, further) if job.is_baseline]
    seconds = estimate_seconds([job.config for job in (*methods, *single[:1])], workers)
    of_methods = sum(runs * seconds[job.fingerprint] for job in methods if not math.isnan(seconds[job.fingerprint]))
    of_single = len(single) * seconds[single[0].fingerprint] if single else 0.0
    return (of_methods + of_single) / workers
