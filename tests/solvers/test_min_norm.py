from itertools import product

import numpy as np
import pytest
from hypothesis import given

from balance.solvers.min_norm import min_norm_error, min_norm_weights
from balance.testing import KINDS
from tests.strategies import jacobians, make_jacobian


@given(jacobians(max_tasks=10, kinds=("generic", "integer", "duplicate", "near_parallel")))
def test_min_norm_point_satisfies_the_kkt_conditions(J):
    G = (J @ J.T).numpy()
    w = min_norm_weights(G)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    assert min_norm_error(G, w) <= 1e-9
    v = w @ G @ w
    stationary = v <= 1e-10 * np.trace(G)
    active = w > 1e-9
    assert stationary or (G @ w)[active] == pytest.approx(v, rel=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 3, 11, 40, 100])
@pytest.mark.parametrize("spread", [1, 30])
def test_min_norm_point_is_exact_at_unequal_scales(num_tasks, spread):
    scales = np.geomspace(1 / spread, spread, num_tasks)
    J = make_jacobian(num_tasks, "generic", 0).numpy() * scales[:, None]
    G = J @ J.T
    assert min_norm_error(G, min_norm_weights(G)) <= 1e-10


@given(jacobians(min_tasks=2, max_tasks=4))
def test_min_norm_point_is_no_longer_than_any_of_a_grid(J):
    G = (J @ J.T).numpy()
    w = min_norm_weights(G)
    grid = [np.array(c) / 6 for c in product(range(7), repeat=len(G)) if sum(c) == 6]
    assert w @ G @ w <= min(c @ G @ c for c in grid) + 1e-9 * np.trace(G)


def test_min_norm_point_where_it_is_not_unique():
    assert min_norm_weights(np.zeros((3, 3))).tolist() == pytest.approx([1 / 3] * 3)
    assert min_norm_weights(np.diag([0.0, 1.0, 0.0])).tolist() == [0.5, 0, 0.5]
    assert min_norm_weights(np.ones((2, 2))).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scale", [1e-150, 1e-15, 1e15, 1e150])
def test_min_norm_point_at_extreme_scales(scale):
    G = np.array([[2.0, -1.0], [-1.0, 3.0]]) * scale
    assert min_norm_weights(G).tolist() == pytest.approx([4 / 7, 3 / 7])


@pytest.mark.parametrize("kind", KINDS)
def test_min_norm_error_is_zero_at_the_solution_and_grows_with_the_distance(kind):
    for seed in range(20):
        J = make_jacobian(2 + seed % 7, kind, seed).numpy()
        G = J @ J.T
        w = min_norm_weights(G)
        assert min_norm_error(G, w) <= 1e-9
        wrong = (w + np.arange(len(w)) / 100) / (w + np.arange(len(w)) / 100).sum()
        if (wrong - w) @ G @ (wrong - w) > 1e-9 * np.trace(G):
            assert min_norm_error(G, wrong) > 1e-6


def test_min_norm_error_of_weights_outside_the_simplex():
    G = np.eye(2)
    assert min_norm_error(G, np.array([0.6, 0.6])) >= 0.2 - 1e-12
    assert min_norm_error(G, np.array([1.5, -0.5])) >= 0.5
    assert min_norm_error(G, np.array([0.5, 0.5])) == 0
