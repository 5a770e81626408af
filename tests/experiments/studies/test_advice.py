import math

import pytest

from balance.diagnosis.advice import MANY_TASKS
from experiments.studies.advice import (
    ADVICE,
    ANY_NUMBER,
    EQUAL,
    FIXED,
    HINDSIGHT,
    MEDIAN,
    REFITTED,
    WITHOUT_PACE,
    best_fixed,
    mean_regrets,
    regrets,
)
from tests.experiments.studies.synthetic import THREE, problem, record


def test_regrets_by_hand():
    table = regrets(THREE)
    assert table[ADVICE] == {"p0": 0, "p1": 0, "p2": 0}
    assert table[EQUAL] == {"p0": 10, "p1": 0, "p2": 19}
    assert table[MEDIAN] == {"p0": 4, "p1": 3, "p2": 1}
    # mean regrets: ls 29 / 3, uw 8 / 3, nashmtl 8 / 3; the first of equals
    assert best_fixed(THREE, THREE.problems) == "uw"
    assert table[HINDSIGHT] == {"p0": 4, "p1": 3, "p2": 1}
    # without p0: ls 19, uw 4, nashmtl 8; without p1: ls 29, uw 5, nashmtl 0; without p2: ls 10, uw 7, nashmtl 8
    assert table[FIXED] == {"p0": 4, "p1": 8, "p2": 1}
    # p0 and p2 are alike and nashmtl is best on both; p1 has no problem like it, and nashmtl is best on the others
    assert table[REFITTED] == {"p0": 0, "p1": 8, "p2": 0}
    assert mean_regrets(table)[EQUAL] == pytest.approx(29 / 3)


def test_conditions_of_the_advice_can_be_left_out():
    drops = {"ls": [5], "uw": [9], "nashmtl": [1]}
    table = regrets(
        record(
            problem(drops, findings=("training pace",)),
            problem(drops, findings=("loss scale",), tasks=MANY_TASKS),
            problem(drops, findings=("conflict",)),
        )
    )
    assert list(table[ADVICE].values()) == [0, 4, 4]
    assert list(table[ANY_NUMBER].values()) == [0, 0, 4]
    assert list(table[WITHOUT_PACE].values()) == [4, 4, 4]


def test_a_method_that_failed_somewhere_is_not_the_best_single_one():
    failing = record(*THREE.problems.values(), problem({"ls": [1], "uw": [], "nashmtl": [2]}))
    assert best_fixed(failing, failing.problems) == "nashmtl"
    assert math.isinf(mean_regrets({"rule": {"a": 1.0, "b": math.inf}})["rule"])


def test_advice_outside_of_the_study_has_no_regret():
    lone = record(problem({"ls": [1], "uw": [2]}, "nashmtl"), problem({"ls": [1], "uw": [2]}))
    assert set(regrets(lone)) == {FIXED, HINDSIGHT, EQUAL, MEDIAN}
