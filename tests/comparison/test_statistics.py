import math

import numpy as np
import pytest

from balance.comparison.statistics import ENOUGH_SEEDS, Estimate, compare_with_best


def test_mean_error_and_interval_by_hand():
    """Of 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7; Student's t with two degrees of freedom reaches 4.302653."""
    estimate = Estimate({0: 1.0, 1: 2.0, 2: 6.0})
    assert estimate.mean == 3
    assert estimate.error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.interval == pytest.approx((3 - 4.302653 * math.sqrt(7 / 3), 3 + 4.302653 * math.sqrt(7 / 3)), rel=1e-6)


def test_one_seed_has_no_error_and_no_interval():
    estimate = Estimate({4: 2.5})
    assert estimate.mean == 2.5
    assert math.isnan(estimate.error)
    assert all(map(math.isnan, estimate.interval))


def test_nan_in_one_seed_is_not_left_out():
    estimate = Estimate({0: 1.0, 1: math.nan})
    assert math.isnan(estimate.mean)
    assert all(map(math.isnan, estimate.interval))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(5, 2, size=(2000, 3))
    intervals = [Estimate(dict(enumerate(sample))).interval for sample in samples.tolist()]
    assert np.mean([low <= 5 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def values(*numbers):
    return dict(enumerate(numbers))


@pytest.mark.parametrize(
    ("numbers", "best", "larger", "verdict"),
    [
        (values(2, 3, 4, 5, 6, 7), values(1, 2, 3, 4, 5, 6), False, "worse"),  # always 1 more
        (values(2, 3, 4, 5, 6, 7), values(1, 2, 3, 4, 5, 6), True, "alike"),  # which is better where large is good
        (values(2, 1, 4, 3, 6, 5), values(1, 2, 3, 4, 5, 6), False, "alike"),  # mean difference 0
        (values(1, 2, 3, 4, 5, 6), values(1, 2, 3, 4, 5, 6), False, "alike"),  # a tie
        (values(2, 3, 4), values(1, 2, 3), False, "unclear"),  # one sign in 1 of 4 cases by chance
        (values(2, 1, 4), values(1, 2, 3), False, "alike"),
        (values(2), values(1), False, "unclear"),
        ({0: 2.0, 1: 3.0}, {7: 1.0, 8: 1.0}, False, "unclear"),  # no seed in common
        (values(math.nan, 1, 1, 1, 1, 1), values(1, 1, 1, 1, 1, 1), False, "worse"),
    ],
)
def test_verdicts_by_hand(numbers, best, larger, verdict):
    assert compare_with_best(numbers, best, higher_is_better=larger) == verdict


def test_pairing_finds_a_small_difference_between_seeds_that_differ_much():
    luck = [0, 100, -50, 30, 10, -80]
    assert (
        compare_with_best(values(*(x + 1 + 0.01 * k for k, x in enumerate(luck))), values(*luck), higher_is_better=False)
        == "worse"
    )
    shuffled = dict(zip([3, 1, 4, 0, 5, 2], (x + 1 for x in luck), strict=True))
    assert compare_with_best(shuffled, values(*luck), higher_is_better=False) == "alike"


def test_equal_methods_are_seldom_called_worse():
    rng = np.random.default_rng(1)
    worse = [
        compare_with_best(
            values(*rng.normal(size=ENOUGH_SEEDS)), values(*rng.normal(size=ENOUGH_SEEDS)), higher_is_better=False
        )
        == "worse"
        for _ in range(200)
    ]
    assert np.mean(worse) < 0.12  # a percentile bootstrap of six pairs errs somewhat more often than its 2.5 % on this side
