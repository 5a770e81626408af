"""Ranks of the methods over the problems, and the differences that are larger than chance."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from pandas import DataFrame

    from experiments.studies.record import StudyRecord

ALPHA = 0.05


def require_posthocs() -> None:
    """Check that the library for the ranks is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if find_spec("scikit_posthocs") is None:
        raise ModuleNotFoundError("study.py needs scikit-posthocs. Use pip install -e . --group study (pip 25.1 or newer).")


def can_rank(record: StudyRecord) -> bool:
    """Return whether a study has enough problems and methods for Friedman's test."""
    return len(record.problems) >= 2 and len(record.methods) >= 3


class Ranking(NamedTuple):
    """Mean ranks over N problems of k methods.

    Attributes:
        ranks: Mean rank by method, from 1, the best, to k; the smallest first.
        p_value: Probability of ranks that differ at least so much if all methods are equal, by Friedman's test.
        critical_difference: Difference of two mean ranks from which Nemenyi's test calls them different at the level 0.05.
        p_values: Probabilities of Nemenyi's test. Shape (k, k), with the methods as index and columns.
    """

    ranks: dict[str, float]
    p_value: float
    critical_difference: float
    p_values: DataFrame


def rank_methods(record: StudyRecord) -> Ranking:
    r"""Rank the methods on every problem, and test whether the mean ranks differ.

    Methods that tie share the mean of their ranks. A method that failed on a problem is the last one there. The difference is

    .. math:: \mathrm{CD} = q_{0.05, k, \infty} \sqrt{\frac{k (k + 1)}{12 N}}

    with the quantile q of the studentized range.

    Args:
        record: A study with at least two problems and three methods.

    Returns:
        Ranks and tests.

    Raises:
        ValueError: If problems or methods are too few.

    Source:
        Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 2006.
    """
    from pandas import DataFrame  # noqa: PLC0415 - of a group that only studies need
    from scikit_posthocs import posthoc_nemenyi_friedman  # noqa: PLC0415

    ranks = stats.rankdata(record.table(), axis=1)
    problems, methods = ranks.shape
    if not can_rank(record):
        raise ValueError(f"Ranks need at least two problems and three methods, but got {problems} and {methods}.")
    means = dict(zip(record.methods, ranks.mean(axis=0).tolist(), strict=True))
    quantile = stats.studentized_range.ppf(1 - ALPHA, methods, np.inf)
    return Ranking(
        dict(sorted(means.items(), key=lambda pair: pair[1])),
        float(stats.friedmanchisquare(*ranks.T).pvalue),
        float(quantile * np.sqrt(methods * (methods + 1) / (12 * problems))),
        posthoc_nemenyi_friedman(DataFrame(ranks, columns=record.methods)),
    )
