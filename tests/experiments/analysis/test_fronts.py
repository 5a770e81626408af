"""Numbers that describe a front, next to their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.analysis.fronts import Front, Point, common_reference, hypervolume, indicators, on_front

POINTS = st.lists(st.tuples(*(st.integers(0, 20).map(lambda n: n / 20) for _ in range(2))), min_size=1, max_size=8)


def by_hand(costs):
    return indicators(np.array(costs), (2.0, 2.0))


def test_three_points_by_hand():
    """Distances 5, 5 and the diagonal; areas 4 * 8 + 3 * 4 + ... below the reference point (10, 10)."""
    costs = np.array([[0.0, 8.0], [3.0, 4.0], [7.0, 1.0]])
    numbers = indicators(costs, (10.0, 10.0))
    assert numbers.hypervolume == pytest.approx(10 * 2 + 7 * 4 + 3 * 3)
    assert numbers.spacing == 0.0
    assert numbers.uniformity == 5.0
    assert numbers.spread == pytest.approx(98**0.5)
    assert numbers.sparsity == pytest.approx((9 + 16 + 16 + 9) / 2)
    assert numbers.num_on_front == 3


def test_spacing_is_the_deviation_of_the_nearest_distances():
    costs = np.array([[0.0, 3.0], [0.0, 2.0], [4.0, 0.0]])
    nearest = [1.0, 1.0, 20**0.5]
    assert by_hand(costs).spacing == pytest.approx(np.std(nearest))


def test_one_point():
    assert by_hand([[1.0, 1.5]]) == (pytest.approx(0.5), 0.0, 0.0, 0.0, 0.0, 1)


@given(POINTS)
def test_hypervolume_is_the_area_of_a_grid(points):
    costs = np.array(points)
    middles = (np.arange(22) + 0.5) / 20  # squares of the grid of all costs, up to the reference point (1.1, 1.1)
    x, y = np.meshgrid(middles, middles)
    is_beaten = ((costs[:, 0, None, None] < x) & (costs[:, 1, None, None] < y)).any(axis=0)
    assert hypervolume(costs, (1.1, 1.1)) == pytest.approx(is_beaten.sum() / 400)


@given(POINTS)
def test_front_by_definition(points):
    for mine, is_on in zip(points, on_front(np.array(points)), strict=True):
        beaten = any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in points)
        assert is_on == (not beaten)


@given(POINTS)
def test_points_that_are_beaten_change_no_area_and_no_sparsity(points):
    costs = np.array(points)
    whole, front = indicators(costs, (1.1, 1.1)), indicators(costs[on_front(costs)], (1.1, 1.1))
    assert whole.hypervolume == pytest.approx(front.hypervolume)
    assert whole.sparsity == pytest.approx(front.sparsity)


def test_points_beyond_the_reference_add_no_area():
    assert hypervolume(np.array([[0.0, 3.0], [3.0, 0.0]]), (1.0, 1.0)) == 0.0


def test_the_common_reference_is_beyond_all_points():
    fronts = [Front("a", (Point(0.5, (1.0, 2.0), (0.0, 0.0)),)), Front("b", (Point(0.5, (3.0, 2.0), (0.0, 0.0)),))]
    assert common_reference(fronts) == pytest.approx((3.2, 2.2))
