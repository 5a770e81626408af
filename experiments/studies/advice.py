"""Regret of the advice of a diagnosis, next to the regret of simpler rules, on the problems of a study."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from balance.diagnosis.advice import choose_pair
from experiments.studies.record import PLAIN

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from balance.types import Remedy
    from experiments.studies.record import ProblemResult, StudyRecord

ADVICE = "advice of diagnose"
ANY_NUMBER = "... without its limit of tasks"
WITHOUT_PACE = "... without the finding of training pace"
REFITTED = "... with methods chosen on the other problems"
FIXED = "best single method, chosen on the other problems"
HINDSIGHT = "best single method in hindsight"
EQUAL = "equal weights"
MEDIAN = "median method"
OF_ADVICE = (ADVICE, ANY_NUMBER, WITHOUT_PACE, REFITTED)


def regrets(record: StudyRecord) -> dict[str, dict[str, float]]:
    """Return the regret of each rule on each problem: its delta_m minus the smallest delta_m of all methods, in points.

    A rule that is "chosen on the other problems" takes the method with the smallest mean regret there. `REFITTED` keeps the
    distinction that the advice makes between problems, and chooses a method for each kind of problem in this way.

    `ANY_NUMBER` and `WITHOUT_PACE` are the advice with one of its conditions left out. Rules that use the advice are left out
    where it names a pair that is no method of the study.

    Args:
        record: A study with at least two problems.
    """
    names = list(record.problems)
    hindsight = best_fixed(record, names)
    table: dict[str, dict[str, float]] = {rule: {} for rule in (*OF_ADVICE, FIXED, HINDSIGHT, EQUAL, MEDIAN)}
    for name, problem in record.problems.items():
        others = [other for other in names if other != name]
        alike = [other for other in others if advised(record.problems[other]) == advised(problem)]
        chosen: dict[str, str | None] = {
            ADVICE: advised(problem),
            ANY_NUMBER: advised(problem, with_limit=False),
            WITHOUT_PACE: advised(problem, without={"training pace"}),
            REFITTED: best_fixed(record, alike or others),
            FIXED: best_fixed(record, others),
            HINDSIGHT: hindsight,
            EQUAL: PLAIN,
        }
        for rule, method in chosen.items():
            if method is not None:
                table[rule][name] = regret(problem, method)
        table[MEDIAN][name] = statistics.median(result.mean for result in problem.methods.values()) - problem.best
    is_complete = all(len(table[rule]) == len(names) for rule in OF_ADVICE)
    return table if is_complete else {rule: table[rule] for rule in table if rule not in OF_ADVICE}


def regret(problem: ProblemResult, method: str) -> float:
    """Return the mean delta_m of a method minus the smallest mean delta_m of all methods."""
    return problem.methods[method].mean - problem.best


def best_fixed(record: StudyRecord, problems: Iterable[str]) -> str:
    """Return the method with the smallest mean regret on some problems."""
    chosen = [record.problems[name] for name in problems]
    return min(record.methods, key=lambda method: statistics.fmean(regret(problem, method) for problem in chosen))


def advised(problem: ProblemResult, *, with_limit: bool = True, without: Collection[Remedy] = ()) -> str | None:
    """Return the name of the method that the library advises; None if it is no method of the study.

    Args:
        problem: Results of a problem, with the findings of its diagnosis.
        with_limit: Whether the number of tasks counts.
        without: Findings that do not count.
    """
    pair = choose_pair(set(problem.findings) - set(without), int(problem.diagnosis["tasks"]) if with_limit else 1)
    pairs = {(result.loss_method, result.gradient_method): name for name, result in reversed(list(problem.methods.items()))}
    return pairs.get(pair)


def mean_regrets(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean regret of each rule over the problems; infinity for a rule that chose a method that failed."""
    return {rule: math.fsum(of_problem.values()) / len(of_problem) for rule, of_problem in table.items()}
