"""Choice of one trial of each method, by validation metrics."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

from balance import metrics as balance_metrics
from balance.comparison.store import Store
from experiments.analysis import baselines
from experiments.problems import base as problems
from experiments.recording.fingerprint import common_of
from experiments.studies.trials import base_config, trials

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from balance.comparison.recorded_run import RecordedRun
    from experiments.studies.study_file import ProblemEntry, Study
    from experiments.sweeps.job import Job


class Records(NamedTuple):
    """Finished runs of one experiment by fingerprint, and their store."""

    store: Store
    runs: Mapping[str, RecordedRun]

    def validation_metrics(self, run: RecordedRun, names: Collection[str]) -> dict[str, float]:
        """Return the validation metrics of the epoch whose network was tested."""
        recorded = self.store.client.get_run(run.run_id).data.metrics
        epoch = int(recorded["best_epoch"])
        histories = {name: self.store.client.get_metric_history(run.run_id, f"val/{name}") for name in names}
        return {name: sorted(history, key=lambda point: point.step)[epoch - 1].value for name, history in histories.items()}


class Judge(NamedTuple):
    """Comparison of runs of one problem with reference networks.

    Attributes:
        reference: Metrics of the reference networks; runs are judged by these metrics.
        higher_is_better: Names of the metrics that should be large.
        average: Whether the mean of the metrics is judged, where a single one of the reference can be zero.
    """

    reference: Mapping[str, float]
    higher_is_better: Collection[str]
    average: bool = False

    def delta_m(self, metrics: Mapping[str, float]) -> float:
        """Return `balance.metrics.delta_m`, or infinity if it is no finite number.

        Returns:
            Percentage; smaller is better.

        Raises:
            ValueError: If the mean is judged of metrics that do not have one direction.
        """
        judged = {name: metrics[name] for name in self.reference}
        if not self.average:
            value = balance_metrics.delta_m(judged, self.reference, self.higher_is_better)
            return value if math.isfinite(value) else math.inf
        directions = {name in self.higher_is_better for name in judged}
        if len(directions) > 1:
            raise ValueError("average must be false where some metrics should be large and others small, but got true.")
        means = [statistics.fmean(values.values()) for values in (judged, self.reference)]
        value = balance_metrics.delta_m({"mean": means[0]}, {"mean": means[1]}, {"mean"} if directions == {True} else ())
        return value if math.isfinite(value) else math.inf


class MissingReferenceError(ValueError):
    """The networks with which delta_m of a problem compares have not finished."""


class Choice(NamedTuple):
    """Chosen trial of a method, and the validation scores of all its trials, with infinity for failed ones."""

    job: Job
    scores: tuple[float, ...]


def recorded_fingerprints(job: Job) -> set[str]:
    """Return the fingerprints of the finished runs of the experiment of a job; nothing is created."""
    try:
        return Store(job.config.experiment, job.config.output_dir).finished()
    except FileNotFoundError:
        return set()


def records(job: Job) -> Records:
    """Return the finished runs of the experiment of a job; a missing store is created."""
    store = Store(job.config.experiment, job.config.output_dir, create=True)
    return Records(store, {run.fingerprint: run for run in reversed(store.runs()) if run.finished})


def judge_of(study: Study, problem: ProblemEntry, further: tuple[str, ...], recorded: Records) -> Judge:
    """Return the judge of a problem, which compares with single-task networks or with the first trial of the reference method.

    Raises:
        MissingReferenceError: If these runs have not finished.
    """
    if problem.reference is None:
        config = base_config(problem, further)
        found = baselines.with_settings(problem.experiment, common_of(config), list(recorded.runs.values()))
        metrics = {} if found is None else found.metrics
    else:
        run = recorded.runs.get(trials(study, problem.reference, problem, further)[0].fingerprint)
        metrics = {} if run is None else dict(run.metrics)
    metrics = {name: value for name, value in metrics.items() if not problem.metrics or name in problem.metrics}
    if not metrics:
        names = "single-task networks" if problem.reference is None else f"first trial of {problem.reference}"
        raise MissingReferenceError(f"delta_m of '{problem.experiment}' needs the {names}, which did not finish.")
    return Judge(metrics, problems.find(problem.experiment).HIGHER_IS_BETTER, average=problem.average)


def choose(jobs: list[Job], recorded: Records, judge: Judge) -> Choice | None:
    """Return the trial with the smallest validation score; None if no trial of the method finished."""
    scores = tuple(_score(job, recorded, judge) for job in jobs)
    best = min(scores)
    return None if best == math.inf else Choice(jobs[scores.index(best)], scores)


def _score(job: Job, recorded: Records, judge: Judge) -> float:
    run = recorded.runs.get(job.fingerprint)
    if run is None:
        return math.inf
    return judge.delta_m(recorded.validation_metrics(run, judge.reference))
