import numpy as np
import pytest
from hypothesis import given

from balance.solvers.bargaining import bargaining_error, bargaining_weights
from balance.solvers.min_norm import min_norm_weights
from tests.strategies import jacobians, make_jacobian


@given(jacobians(max_tasks=10, kinds=("generic", "integer", "duplicate", "near_parallel")))
def test_bargaining_solution_satisfies_its_equation(J):
    G = (J @ J.T).numpy()
    if (np.diag(G) == 0).any():
        return
    w = bargaining_weights(G)
    shortest = min_norm_weights(G / np.sqrt(np.outer(np.diag(G), np.diag(G))))
    distance = shortest @ (G / np.sqrt(np.outer(np.diag(G), np.diag(G)))) @ shortest
    if w is None:
        assert distance < 1e-9  # 0 is in the convex hull of the gradients, or nearly
    elif distance > 1e-6:
        assert (w > 0).all()
        assert bargaining_error(G, w) <= 1e-8


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 40, 100])
@pytest.mark.parametrize("spread", [1, 1e15])
def test_bargaining_is_exact_at_unequal_scales(num_tasks, spread):
    scales = np.geomspace(1 / spread, spread, num_tasks)
    J = make_jacobian(num_tasks, "generic", 1).numpy() * scales[:, None]
    G = J @ J.T
    assert bargaining_error(G, bargaining_weights(G)) <= 1e-8


@pytest.mark.parametrize("G", [[[5.0, -5.0], [-5.0, 5.0]], [[20.0, 4, -18], [4, 40, -12], [-18, -12, 18]]])
def test_bargaining_has_no_solution_at_a_pareto_stationary_point(G):
    assert bargaining_weights(np.array(G)) is None


def test_bargaining_error_of_a_shortened_direction():
    J = make_jacobian(4, "generic", 0).numpy()
    G = J @ J.T
    weights = bargaining_weights(G)
    assert bargaining_error(G, weights / 2, length=1.0) <= 1e-12  # the solution has length 2
    assert bargaining_error(G, weights / 2) == pytest.approx(0.75)
    assert bargaining_error(G, weights * [1, 1, 1, 1.01]) > 1e-3


def test_bargaining_error_leaves_out_zero_gradients():
    G = np.diag([0.0, 4.0])
    assert bargaining_error(G, np.array([0.0, 0.5])) == 0
    assert bargaining_error(np.zeros((2, 2)), np.zeros(2)) == 0


def test_bargaining_error_of_zero_weights_is_zero_only_without_a_bargain():
    assert bargaining_error(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.zeros(2)) == 0
    assert bargaining_error(np.eye(2), np.zeros(2)) == np.inf
