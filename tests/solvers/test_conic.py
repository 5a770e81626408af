import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance.solvers.conic import conic_error, conic_weights
from balance.solvers.min_norm import min_norm_weights
from tests.strategies import jacobians, make_jacobian


@pytest.mark.parametrize("c", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 40, 100])
def test_conic_weights_solve_the_problem(num_tasks, c):
    for seed in range(20 if num_tasks < 40 else 3):
        J = make_jacobian(num_tasks, "generic", seed).numpy()
        assert conic_error(J @ J.T, conic_weights(J @ J.T, c), c) <= 1e-9


@given(
    jacobians(max_tasks=10, kinds=("integer", "duplicate", "near_parallel", "low_rank", "rounded", "stationary")),
    st.floats(0.05, 1),
)
def test_conic_weights_solve_the_problem_of_dependent_gradients(J, c):
    G = (J @ J.T).numpy()
    if (np.diag(G) > 0).all():
        weights = conic_weights(G, c)
        assert (weights >= 0).all()
        assert conic_error(G, weights, c) <= 1e-6


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_an_independent_program_finds_the_direction(num_tasks, c):
    """The convex form of the problem, with at most the mean's length, where some direction helps every task."""
    for seed in range(6):
        J = make_jacobian(num_tasks, "generic", seed).numpy()
        mean = J.mean(axis=0)
        d = cp.Variable(J.shape[1])
        length = float(np.linalg.norm(mean))
        within = [cp.norm(d) <= length, c * length * cp.norm(d) <= mean @ d]
        problem = cp.Problem(cp.Maximize(cp.min(J @ d)), within)
        problem.solve(solver=cp.CLARABEL)
        if problem.value > 1e-3 * length:
            assert np.linalg.norm(conic_weights(J @ J.T, c) @ J - d.value) <= 1e-3 * length


@pytest.mark.parametrize("num_tasks", [3, 7, 11, 16, 20])
def test_a_direction_inside_the_cone_is_the_shortest_vector_s_whatever_the_lengths(num_tasks):
    """Lengths differ by up to 20 decades, so that the certificate does not see the gains of the shortest gradients."""
    for seed in range(60):
        lengths = 10.0 ** np.random.default_rng(seed).uniform(-10, 10, (num_tasks, 1))
        J = make_jacobian(num_tasks, "generic", seed).numpy() * lengths
        d, mean, shortest = conic_weights(J @ J.T, 0.5) @ J, J.mean(axis=0), min_norm_weights(J @ J.T) @ J
        assert cosine(d, mean) == pytest.approx(0.5) or cosine(d, shortest) == pytest.approx(1)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_no_direction_in_a_narrow_cone_helps_every_task_and_the_worst_off_loses_least():
    """A scan of the plane: the direction is at the boundary of the cone."""
    J = np.array([[10.0, 0.0], [-1.0, 0.1]])
    mean = J.mean(axis=0)
    for c in (0.5, 0.9):
        angles = np.arctan2(mean[1], mean[0]) + np.linspace(-1, 1, 20001) * np.arccos(c)
        directions = np.linalg.norm(mean) * np.stack([np.cos(angles), np.sin(angles)])
        best = (J @ directions).min(axis=0).max()
        d = conic_weights(J @ J.T, c) @ J
        assert (J @ d).min() == pytest.approx(best, rel=1e-6)
        assert best < 0


def test_error_of_other_weights():
    J = make_jacobian(4, "generic", 0).numpy()
    G = J @ J.T
    weights = conic_weights(G, 0.5)
    assert conic_error(G, 2 * weights, 0.5) == pytest.approx(1)
    assert conic_error(G, np.zeros(4), 0.5) == 1
    assert conic_error(G, weights * [1, 1, 1, 1.01], 0.5) > 1e-4
    assert conic_error(np.zeros((2, 2)), np.zeros(2), 0.5) == 0
    assert conic_error(np.zeros((2, 2)), np.ones(2), 0.5) == 1
    assert conic_error(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.zeros(2), 0.5) == 0
