import numpy as np
import pytest
from hypothesis import given

from balance.solvers.linear_algebra import (
    equal_projection_error,
    equal_projection_weights,
    gradient_norms,
    least_distance,
    non_negative_minimum,
    share_between_equals,
    square_root,
)
from tests.strategies import jacobians


@given(jacobians(max_tasks=10))
def test_square_root(J):
    G = (J @ J.T).numpy()
    R = square_root(G)
    assert pytest.approx(G, abs=1e-10 * np.trace(G)) == R.T @ R


def test_share_between_equals_keeps_the_sum():
    G = np.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    assert share_between_equals(np.array([0.6, 0.0, 0.4]), G).tolist() == [0.3, 0.3, 0.4]


def random_problem(seed):
    """A regular quadratic function and any guess of the positive variables."""
    random = np.random.default_rng(seed)
    K = int(random.integers(1, 12))
    R = random.normal(size=(K + 2, K)) + 2 * random.normal(size=(K + 2, 1))
    return R.T @ R, random.normal(size=K), random.random(K) < 0.5


def test_non_negative_minimum_satisfies_its_optimality_conditions_whatever_the_guess():
    for seed in range(300):
        M, b, guess = random_problem(seed)
        before = guess.copy()
        x = non_negative_minimum(M, b, guess)
        assert x is not None
        assert (x >= 0).all()
        assert (M @ x - b >= -1e-9).all()
        assert x * (M @ x - b) == pytest.approx(np.zeros(len(b)), abs=1e-9)
        assert (guess == before).all()


def test_non_negative_minimum_of_a_nearly_singular_matrix_is_none():
    """Its smallest pivot counts, and every free variable is a pivot."""
    for angle, regular in ((1e-3, True), (1e-5, True), (1e-7, False)):
        R = np.array([[1.0, 1.0], [0.0, angle]])
        x = non_negative_minimum(R.T @ R, np.array([1.0, 1.0 + angle**2 / 2]), np.array([True, True]))
        assert (x is not None) == regular
    assert non_negative_minimum(np.array([[1.0, 2.0], [2.0, 1.0]]), np.ones(2), np.array([True, True])) is None


def test_non_negative_minimum_without_positive_variables():
    assert non_negative_minimum(np.eye(2), np.array([-1.0, -2.0]), np.array([True, False])).tolist() == [0, 0]


def test_least_distance():
    """By hand: y minimises y² + (2 y - 1)², and a negative product is worth nothing."""
    assert least_distance(np.array([[1.0]]), np.array([2.0])).tolist() == pytest.approx([0.4])
    assert least_distance(np.array([[1.0]]), np.array([-2.0])).tolist() == [0]


def test_gradient_norms_of_a_square_that_rounding_made_negative():
    assert gradient_norms(np.diag([4.0, 0.0, -1e-20])).tolist() == [2, 0, 0]


@given(jacobians(kinds=("generic",)))
def test_equal_projections_satisfy_their_equation(J):
    G = (J @ J.T).numpy()
    norms = np.sqrt(np.diag(G))
    x = equal_projection_weights(G)
    assert G / norms[:, None] / norms @ x == pytest.approx(np.ones(len(G)), abs=1e-7)
    assert equal_projection_error(G, x / norms) <= 1e-7


def test_equal_projections_of_dependent_gradients_are_the_shortest_solution():
    assert equal_projection_weights(np.ones((2, 2))).tolist() == pytest.approx([0.5, 0.5])
    assert equal_projection_weights(np.array([[1.0, -1.0], [-1.0, 1.0]])).tolist() == [0, 0]


@given(jacobians(kinds=("low_rank", "duplicate", "opposite", "rounded")))
def test_equal_projections_of_dependent_gradients_are_least_squares(J):
    J = J[J.norm(dim=1) > 0]
    C = (J @ J.T / (J.norm(dim=1, keepdim=True) * J.norm(dim=1))).numpy()
    expected = np.linalg.pinv(C, rcond=1e-10, hermitian=True) @ np.ones(len(C))
    assert equal_projection_weights((J @ J.T).numpy()) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_both_ways_to_equal_projections_agree_where_they_meet():
    """The factorisation is used down to a condition of about 1e6; with a coarser cutoff the eigenvalues are."""
    random = np.random.default_rng(0)
    for angle in np.geomspace(1e-4, 1, 50):
        J = random.normal(size=(4, 9))
        J[1] = J[0] + angle * random.normal(size=9)
        regular = equal_projection_weights(J @ J.T)
        C = J @ J.T / np.outer(np.linalg.norm(J, axis=1), np.linalg.norm(J, axis=1))
        values, vectors = np.linalg.eigh(C)
        assert regular == pytest.approx(vectors @ (vectors.sum(axis=0) / values), rel=1e-6, abs=1e-6 * np.abs(regular).max())


def test_equal_projection_error_is_the_relative_spread():
    G = np.diag([1.0, 4.0, 0.0])
    assert equal_projection_error(G, np.array([1.0, 0.5, 0.0])) == 0
    assert equal_projection_error(G, np.array([1.0, 0.25, 9.0])) == 0.5
    assert equal_projection_error(G, np.zeros(3)) == 0
