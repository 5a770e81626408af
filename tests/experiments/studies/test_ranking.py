import math

import pytest
from scipy import stats

from experiments.studies import ranking as ranking_module
from experiments.studies.ranking import rank_methods, require_posthocs
from tests.experiments.studies.synthetic import THREE, problem, record


def test_ranks_by_hand():
    ranking = rank_methods(THREE)
    assert ranking.ranks == pytest.approx({"nashmtl": 5 / 3, "uw": 2, "ls": 7 / 3})
    assert list(ranking.ranks) == ["nashmtl", "uw", "ls"]
    # Friedman's statistic of these ranks: 12 / (3 * 3 * 4) * (7² + 6² + 5²) - 3 * 3 * 4 = 2 / 3, of chi² with two degrees
    assert ranking.p_value == pytest.approx(stats.chi2.sf(2 / 3, 2))


def test_critical_difference_of_the_source():
    """Demšar's table 5 has q = 2.343 for three and 2.728 for five classifiers."""
    assert rank_methods(THREE).critical_difference == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 3)), rel=1e-3)


def test_nemenyi_agrees_with_the_critical_difference():
    """With many problems the two methods that differ by more than the critical difference have p < 0.05, and no others."""
    many = record(*[problem({"ls": [3, 3], "uw": [1, 1], "nashmtl": [1.1, 1.1]})] * 12)
    ranking = rank_methods(many)
    for first, rank in ranking.ranks.items():
        for second, other in ranking.ranks.items():
            if first != second:
                assert (abs(rank - other) > ranking.critical_difference) == (ranking.p_values.loc[first, second] < 0.05)
    assert ranking.p_values.loc["ls", "uw"] < 0.05


def test_ties_share_a_rank_and_a_failed_method_is_the_last():
    ranking = rank_methods(record(*[problem({"ls": [], "uw": [1, 1], "nashmtl": [1, 1]})] * 2))
    assert ranking.ranks == {"uw": 1.5, "nashmtl": 1.5, "ls": 3}


def test_one_problem_has_no_ranks():
    with pytest.raises(ValueError, match="at least two problems and three methods, but got 1 and 3"):
        rank_methods(record(problem({"ls": [1], "uw": [2], "nashmtl": [3]})))


def test_missing_library_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(ranking_module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--group study"):
        require_posthocs()
