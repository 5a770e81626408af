"""Results of a study, collected from the recorded runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from balance.diagnosis.findings import find_problems
from balance.diagnosis.statistics import median, ratio
from experiments.studies.choice import choose, judge_of, records
from experiments.studies.costs import step_times
from experiments.studies.record import MethodResult, ProblemResult, StudyRecord
from experiments.studies.trials import base_config, trials, with_seed
from experiments.training.diagnosis import diagnose_network

if TYPE_CHECKING:
    from balance import Diagnosis
    from balance.comparison.recorded_run import RecordedRun
    from experiments.studies.choice import Choice, Judge, Records
    from experiments.studies.study_file import ProblemEntry, Study
    from experiments.sweeps.job import Job


def collect(study: Study, further: tuple[str, ...]) -> StudyRecord:
    """Return the results of a study whose runs have ended, with a diagnosis of each problem.

    Args:
        study: The study.
        further: Entries of the trainer's configuration for all runs, such as the folder for the output.

    Raises:
        MissingReferenceError: If the networks that delta_m compares with have not finished.
    """
    problems = {name: _problem_result(study, problem, further) for name, problem in study.problems.items()}
    return StudyRecord(study.seeds, tuple(study.rates), problems)


def _problem_result(study: Study, problem: ProblemEntry, further: tuple[str, ...]) -> ProblemResult:
    config = base_config(problem, further)
    recorded = records(trials(study, next(iter(study.methods)), problem, further)[0])
    judge = judge_of(study, problem, further, recorded)
    jobs = {name: trials(study, name, problem, further) for name in study.methods}
    results = {
        name: _method_result(study, of_method, choose(of_method, recorded, judge), recorded, judge)
        for name, of_method in jobs.items()
    }
    times = step_times({name: of_method[0].config for name, of_method in jobs.items()})
    results = {name: replace(result, step_seconds=times.get(name)) for name, result in results.items()}
    diagnosis = diagnose_network(config, priced=())
    origin = "single-task networks" if problem.reference is None else f"the first trial of {problem.reference}"
    found = find_problems(diagnosis.start, diagnosis.end)
    return ProblemResult(
        problem.experiment,
        tuple(problem.overrides),
        origin,
        results,
        diagnosis_numbers(diagnosis),
        tuple(finding.problem for finding in found if finding.present),
    )


def _method_result(study: Study, jobs: list[Job], choice: Choice | None, recorded: Records, judge: Judge) -> MethodResult:
    config = jobs[0].config
    finals: dict[int, RecordedRun | None] = {}
    if choice is not None:
        finals = {seed: recorded.runs.get(with_seed(choice.job, seed).fingerprint) for seed in range(study.seeds)}
    runs = [*(recorded.runs.get(job.fingerprint) for job in jobs), *finals.values()]
    scores = () if choice is None else choice.scores
    return MethodResult(
        config.loss_method,
        config.gradient_method,
        {seed: math.inf if run is None else judge.delta_m(run.metrics) for seed, run in finals.items()},
        failed=runs.count(None),
        chosen=() if choice is None else _settings(choice.job, jobs[0]),
        scores=scores,
    )


def _settings(job: Job, first: Job) -> tuple[str, ...]:
    """Return the entries of a trial that trials distinguish: options of the methods, and the learning rate."""
    shared = {word for word in first.overrides if not word.startswith(("train.lr=", "loss.", "gradient."))}
    return tuple(word for word in dict.fromkeys(job.overrides) if word not in shared)


def diagnosis_numbers(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the numbers of a diagnosis after some training on which advice can rest, by name."""
    end, start = diagnosis.end, diagnosis.start
    pace = median(end.losses) / median(start.losses)
    return {
        "tasks": float(len(end.tasks)),
        "loss_ratio": ratio(end.losses),
        "length_ratio": ratio(end.norms),
        "relative_length_ratio": ratio(end.relative_norms),
        "largest_share": float(end.shares.max()),
        "conflict_share": end.conflict_share,
        "least_cosine": min((pair.mean for pair in end.pairs), default=1.0),
        "pace_ratio": ratio(pace[None]),
    }
