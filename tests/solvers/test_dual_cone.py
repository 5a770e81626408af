import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from balance.solvers import dual_cone
from balance.solvers.dual_cone import (
    dual_cone_coefficients,
    projection_error,
    projection_of_sum,
    sum_of_projections,
    sum_of_projections_error,
)
from balance.solvers.linear_algebra import square_root
from tests.strategies import SEEDS, jacobians, make_jacobian


def unit_rows(J):
    norms = np.linalg.norm(J, axis=1, keepdims=True)
    return J[norms[:, 0] > 0] / norms[norms[:, 0] > 0]


def assert_projects(U, B, X, tolerance=1e-9):
    """Moreau's conditions, and no greater length than of the projection that the active-set method finds on the gradients.

    The projection is the only shortest vector. In scipy 1.15 the active-set method ends early on some of these problems.
    """
    assert (X >= 0).all()
    projected = U.T @ (B + X)
    products = U @ projected
    assert products.min() >= -tolerance * np.abs(B).sum()
    assert np.abs(X * products).max() <= tolerance * np.abs(B).sum() * max(1, np.abs(X).max())
    for column, target in enumerate((U.T @ B).T):
        found = target + U.T @ nnls(U.T, -target, maxiter=1000 * len(U))[0]
        excess = np.linalg.norm(projected[:, column]) - np.linalg.norm(found)
        assert excess <= tolerance * np.abs(B[:, column]).sum()


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 17, 40, 100])
def test_projections_of_independent_gradients(num_tasks):
    for seed in range(3):
        U = unit_rows(make_jacobian(num_tasks, "generic", seed).numpy())
        assert_projects(U, np.eye(len(U)), dual_cone_coefficients(U @ U.T))


@given(jacobians(max_tasks=10))
def test_projections_of_dependent_gradients(J):
    U = unit_rows(J.numpy())
    if len(U):
        # to float64's rounding of the Gramian, which is the square of the rounding of a direction
        assert_projects(U, np.eye(len(U)), dual_cone_coefficients(U @ U.T), tolerance=1e-6)


@pytest.mark.parametrize(("num_tasks", "rank"), [(20, 3), (20, 10), (30, 15), (40, 30), (40, 39)])
def test_projections_with_more_tasks_than_parameters(num_tasks, rank):
    for seed in range(3):
        U = unit_rows(np.random.default_rng(seed).normal(size=(num_tasks, rank)))
        assert_projects(U, np.eye(len(U)), dual_cone_coefficients(U @ U.T))


@given(SEEDS, st.integers(1, 30))
def test_projections_of_combinations(seed, num_tasks):
    random = np.random.default_rng(seed)
    U = unit_rows(random.normal(size=(num_tasks, num_tasks + 2)))
    B = random.exponential(size=(num_tasks, 3))
    assert_projects(U, B, dual_cone_coefficients(U @ U.T, B))


def test_the_active_set_method_takes_over_where_block_pivoting_fails(monkeypatch):
    U = unit_rows(make_jacobian(20, "generic", 0).numpy())
    expected = dual_cone_coefficients(U @ U.T)
    monkeypatch.setattr(dual_cone, "_pivot", lambda M, q, passive: None)
    monkeypatch.setattr(dual_cone, "_guess", lambda C, Q: np.zeros(Q.shape, dtype=bool))
    np.testing.assert_allclose(dual_cone_coefficients(U @ U.T), expected, atol=1e-9)
    duplicates = U[[0, 1, 2, 3, 0, 1, 2, 3]]
    assert_projects(duplicates, np.eye(8), dual_cone_coefficients(duplicates @ duplicates.T))


def test_a_wrong_guess_changes_nothing(monkeypatch):
    U = unit_rows(make_jacobian(30, "generic", 1).numpy())
    expected = dual_cone_coefficients(U @ U.T)
    for value in (False, True):
        monkeypatch.setattr(dual_cone, "_guess", lambda C, Q, value=value: np.full(Q.shape, value))
        np.testing.assert_allclose(dual_cone_coefficients(U @ U.T), expected, atol=1e-12)


def test_both_sums_are_one_projection_for_one_task_and_for_no_conflict():
    lengths = np.array([2.0, 3.0])
    for C in (np.eye(2), np.ones((2, 2))):
        assert sum_of_projections(C, lengths).tolist() == [0, 0]
        assert projection_of_sum(C, lengths).tolist() == [0, 0]


@pytest.mark.parametrize("spread", [1.0, 1e10])
def test_errors_of_other_weights(spread):
    J = make_jacobian(5, "generic", 0).numpy() * np.geomspace(1, spread, 5)[:, None]
    G, norms = J @ J.T, np.linalg.norm(J, axis=1)
    C = G / np.outer(norms, norms)
    upgrad = 0.2 + sum_of_projections(C, 0.2 * norms) / norms
    dualproj = 0.2 + projection_of_sum(C, 0.2 * norms) / norms
    assert sum_of_projections_error(G, upgrad) <= 1e-12
    assert projection_error(G, dualproj) <= 1e-12
    last = np.array([0, 0, 0, 0, 1e-3])
    assert sum_of_projections_error(G, upgrad + last) > 1e-5
    assert projection_error(G, dualproj - last) > 1e-5


def test_errors_leave_out_zero_gradients():
    for error in (sum_of_projections_error, projection_error):
        assert error(np.zeros((2, 2)), np.full(2, 0.5)) == 0
        assert error(np.diag([0.0, 4.0]), np.full(2, 0.5)) == 0
        assert error(np.diag([0.0, 4.0]), np.array([0.5, 0.4])) > 0.01


def test_the_square_root_keeps_the_gramian_of_dependent_gradients():
    U = unit_rows(make_jacobian(6, "duplicate", 0).numpy())
    root = square_root(U @ U.T)
    np.testing.assert_allclose(root.T @ root, U @ U.T, atol=1e-12)
