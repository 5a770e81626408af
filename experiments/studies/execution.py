"""Execution of a study: for each problem the trials, the choice, then the seeds of the chosen trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.studies.choice import MissingReferenceError, choose, judge_of, records
from experiments.studies.trials import baselines_to_train, trials, with_seed
from experiments.sweeps.execute import record_names, run_jobs

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.studies.choice import Choice
    from experiments.studies.study_file import ProblemEntry, Study
    from experiments.sweeps.job import Job


class Execution:
    """Runs of a study on this machine or on a cluster.

    Args:
        study: The study.
        further: Entries of the trainer's configuration for all runs, such as the folder for the output.
        workers: Runs at a time.
        backend: Name of joblib's backend, which is connected.
        console: Console for the results.
    """

    def __init__(self, study: Study, further: tuple[str, ...], workers: int, backend: str, console: Console) -> None:
        self.study = study
        self.further = further
        self.workers = workers
        self.backend = backend
        self.console = console

    def run(self) -> int:
        """Run whatever has not finished; return the number of runs that failed.

        Returns:
            The number.

        Raises:
            MissingReferenceError: After all other runs, if the networks with which delta_m compares failed on a problem.
        """
        failed, missing = 0, []
        for name in self.study.problems:
            try:
                failed += self.run_problem(name)
            except MissingReferenceError as error:
                missing.append(str(error))
        if missing:
            raise MissingReferenceError(" ".join(missing))
        return failed

    def run_problem(self, name: str) -> int:
        """Run the trials of all methods on a problem, then the seeds of the chosen trials; return the number of failures."""
        problem = self.study.problems[name]
        self.console.rule(name)
        failed = self.run_jobs(first_jobs(self.study, problem, self.further))
        chosen = choices(self.study, problem, self.further)
        return failed + self.run_jobs(final_jobs(self.study, chosen))

    def run_jobs(self, jobs: list[Job]) -> int:
        """Run the jobs that have not finished; return the number of failures, whose messages are printed."""
        finished = records(jobs[0]).runs.keys() if jobs else ()
        outcomes = run_jobs([job.with_state(finished) for job in jobs], self.workers, self.backend, self.console)
        if outcomes:
            record_names(jobs)
        return sum(outcome.error is not None for _, outcome in outcomes)


def first_jobs(study: Study, problem: ProblemEntry, further: tuple[str, ...]) -> list[Job]:
    """Return the single-task networks and the trials of all methods.

    Raises:
        ValueError: If an entry is wrong.
    """
    all_trials = [job for name in study.methods for job in trials(study, name, problem, further)]
    jobs = {job.fingerprint: job for job in (*baselines_to_train(study, problem, further), *all_trials)}
    return list(jobs.values())


def choices(study: Study, problem: ProblemEntry, further: tuple[str, ...]) -> dict[str, Choice | None]:
    """Return the chosen trial of each method by name; None for a method of which no trial finished.

    Raises:
        MissingReferenceError: If the networks that delta_m compares with have not finished.
    """
    jobs = {name: trials(study, name, problem, further) for name in study.methods}
    recorded = records(next(iter(jobs.values()))[0])
    judge = judge_of(study, problem, further, recorded)
    return {name: choose(of_method, recorded, judge) for name, of_method in jobs.items()}


def final_jobs(study: Study, chosen: dict[str, Choice | None]) -> list[Job]:
    """Return the runs of the chosen trials, with every seed."""
    return [with_seed(choice.job, seed) for choice in chosen.values() if choice for seed in range(study.seeds)]
