"""Regret of the advice of a diagnosis, next to the regret of simpler rules, on the problems of a study."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from experiments.studies.record import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from experiments.studies.record import ProblemResult, StudyRecord

ADVICE = "advice of diagnose"
REFITTED = "advice, its methods chosen on the other problems"
FIXED = "best single method, chosen on the other problems"
HINDSIGHT = "best single method in hindsight"
EQUAL = "equal weights"
MEDIAN = "median method"


def regrets(record: StudyRecord) -> dict[str, dict[str, float]]:
    """Return the regret of each rule on each problem: its delta_m minus the smallest delta_m of all methods, in points.

    A rule that is "chosen on the other problems" takes the method with the smallest mean regret there. `REFITTED` keeps the
    distinction that the advice makes between problems, and chooses a method for each kind of problem in this way.

    Args:
        record: A study with at least two problems.

    Raises:
        ValueError: If the advice names a pair that is no method of the study.
    """
    names = list(record.problems)
    hindsight = best_fixed(record, names)
    table: dict[str, dict[str, float]] = {rule: {} for rule in (ADVICE, REFITTED, FIXED, HINDSIGHT, EQUAL, MEDIAN)}
    for name, problem in record.problems.items():
        others = [other for other in names if other != name]
        alike = [other for other in others if record.problems[other].advice == problem.advice]
        chosen = {
            ADVICE: advised(problem),
            REFITTED: best_fixed(record, alike or others),
            FIXED: best_fixed(record, others),
            HINDSIGHT: hindsight,
            EQUAL: PLAIN,
        }
        for rule, method in chosen.items():
            table[rule][name] = regret(problem, method)
        table[MEDIAN][name] = statistics.median(result.mean for result in problem.methods.values()) - problem.best
    return table


def regret(problem: ProblemResult, method: str) -> float:
    """Return the mean delta_m of a method minus the smallest mean delta_m of all methods."""
    return problem.methods[method].mean - problem.best


def best_fixed(record: StudyRecord, problems: Iterable[str]) -> str:
    """Return the method with the smallest mean regret on some problems."""
    chosen = [record.problems[name] for name in problems]
    return min(record.methods, key=lambda method: statistics.fmean(regret(problem, method) for problem in chosen))


def advised(problem: ProblemResult) -> str:
    """Return the name of the method that the diagnosis advises.

    Raises:
        ValueError: If it is no method of the study.
    """
    for name, result in problem.methods.items():
        if (result.loss_method, result.gradient_method) == problem.advice:
            return name
    raise ValueError(f"The methods of the study must contain the advised pair, but got {problem.advice}. Add it to the file.")


def mean_regrets(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean regret of each rule over the problems; infinity for a rule that chose a method that failed."""
    return {rule: math.fsum(of_problem.values()) / len(of_problem) for rule, of_problem in table.items()}
