import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance.solvers import conflict_averse
from balance.solvers.conflict_averse import conflict_averse_error, conflict_averse_weights
from balance.solvers.min_norm import min_norm_weights
from tests.strategies import SEEDS, jacobians, make_jacobian


def conflict_averse_direction(J, c):
    """CAGrad's direction, without rescaling."""
    return (1 / len(J) + conflict_averse_weights(J @ J.T, c)) @ J


def assert_solves_the_published_problem(J, c, tolerance=1e-9):
    G = J @ J.T
    x = conflict_averse_weights(G, c)
    assert (x >= 0).all()
    assert conflict_averse_error(G, x, c) <= tolerance


@pytest.mark.parametrize("c", [0.01, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 40, 100])
def test_conflict_averse_weights_solve_the_published_problem(num_tasks, c):
    for seed in range(20 if num_tasks < 40 else 4):
        assert_solves_the_published_problem(make_jacobian(num_tasks, "generic", seed).numpy(), c)


@given(jacobians(max_tasks=10), st.sampled_from([0.01, 0.4, 0.9, 1.0, 5.0]))
def test_conflict_averse_weights_solve_the_published_problem_of_dependent_gradients(J, c):
    assert_solves_the_published_problem(J.numpy(), c, tolerance=1e-6)


@pytest.mark.parametrize("c", [0.4, 5.0])
def test_conflict_averse_weights_of_nearly_parallel_gradients_that_limit_the_gain_together(c):
    """Their Gramian is nearly singular, so that the points at a level come from least-distance programming."""
    for angle in (1e-5, 3e-5):
        J = np.array([[1.0, angle, 0.0], [1.0, -angle, 0.0], [0.2, 0.0, 3.0]])
        assert (conflict_averse_weights(J @ J.T, c)[:2] > 0).all()
        assert_solves_the_published_problem(J, c)


@given(SEEDS, st.integers(2, 9), st.sampled_from([0.1, 0.4, 0.9]))
def test_conflict_averse_weights_with_more_tasks_than_parameters(seed, num_tasks, c):
    J = np.random.default_rng(seed).normal(size=(num_tasks, max(1, num_tasks // 2)))
    assert_solves_the_published_problem(J, c)


@given(jacobians(kinds=("stationary", "opposite", "zero_row", "low_rank", "integer")), st.sampled_from([0.2, 1.0, 2.0]))
def test_conflict_averse_direction_is_the_nearest_of_several_solutions(J, c):
    """If the worst gain is 0, the direction is the projection of the mean on the dual cone: Moreau's conditions."""
    J = J.numpy()
    mean, d = J.mean(axis=0), conflict_averse_direction(J, c)
    scale = np.linalg.norm(J) * np.linalg.norm(mean)
    v = min_norm_weights(J @ J.T) @ J
    if v @ v > 1e-12 * np.linalg.norm(J) ** 2 or (J @ d).min() < -1e-7 * scale:
        return  # 0 is not in the convex hull, or the solution is unique
    x = conflict_averse_weights(J @ J.T, c)
    assert (x >= 0).all()
    assert x * (J @ d) == pytest.approx(np.zeros(len(J)), abs=1e-7 * max(1.0, x.sum()) * scale)
    if (J @ mean).min() >= 0:
        assert d == pytest.approx(mean, abs=1e-9 * np.linalg.norm(J))


@pytest.mark.parametrize("c", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("decades", [0, 3, 10])
@pytest.mark.parametrize("kind", ["generic", "opposite", "zero_row", "low_rank", "rounded", "stationary"])
def test_conflict_averse_direction_never_conflicts_from_c_1(kind, decades, c):
    """Tasks whose gradients differ by up to 20 decades are included, as is 0 in the convex hull, or nearly in it."""
    random = np.random.default_rng(0)
    for seed in range(20):
        J = make_jacobian(2 + seed % 7, kind, seed).numpy() * 10.0 ** random.uniform(-decades, decades, (2 + seed % 7, 1))
        lengths = np.linalg.norm(J, axis=1)
        weights = 1 / len(J) + conflict_averse_weights(J @ J.T, c)
        assert (J @ (weights @ J) >= -1e-12 * lengths * (weights @ lengths)).all()


@pytest.mark.parametrize("angle", [10.0**-k for k in range(1, 15)])
def test_conflict_averse_direction_of_nearly_opposite_gradients(angle):
    """They leave a thin cone, whose exact projection can have weights beyond all precision."""
    random = np.random.default_rng(0)
    for _ in range(20):
        J = random.normal(size=(5, 7))
        J[1] = -2 * J[0] + angle * random.normal(size=7)
        weights = 1 / 5 + conflict_averse_weights(J @ J.T, 1.0)
        lengths, mean = np.linalg.norm(J, axis=1), np.linalg.norm(J.mean(axis=0))
        assert weights @ lengths <= 1e7 * mean
        assert (J @ (weights @ J) >= -1.1e-6 * lengths * mean).all()
        assert np.linalg.norm(weights @ J - J.mean(axis=0)) <= (1 + 1e-3) * mean


def test_conflict_averse_direction_of_nearly_opposite_gradients_conflicts_only_with_tasks_without_a_weight():
    """All other tasks are exactly at a gain of zero, although the cone is too thin for the exact projection."""
    random = np.random.default_rng(0)
    for _ in range(40):
        J = random.normal(size=(5, 7))
        J[1] = -2 * J[0] + 10.0 ** random.uniform(-12, -7) * random.normal(size=7)
        x = conflict_averse_weights(J @ J.T, 1.0)
        assert (x >= 0).all()
        gains = J @ ((1 / 5 + x) @ J) / np.linalg.norm(J, axis=1)
        assert (np.abs(gains[x > 0]) <= 1e-10 * np.linalg.norm(J.mean(axis=0))).all()


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("kind", ["stationary", "opposite", "zero_row", "low_rank", "generic", "rounded"])
def test_conflict_averse_direction_is_continuous_where_it_is_unique(kind, c):
    """A change of the gradients by 1e-4 to 1e-9 changes the direction as little, also where 0 enters the convex hull."""
    random = np.random.default_rng(0)
    unique = 0
    for seed in range(20):
        J = make_jacobian(2 + seed % 5, kind, seed).numpy()
        d, size = conflict_averse_direction(J, c), np.linalg.norm(J)
        v = min_norm_weights(J @ J.T) @ J
        if v @ v <= 1e-12 * size**2 and (J @ d).min() >= -1e-3 * np.linalg.norm(J.mean(axis=0)) * size:
            continue  # several directions conflict with no task
        unique += 1
        noise = random.normal(size=J.shape) * size / J.size**0.5
        for change in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9):
            assert np.linalg.norm(conflict_averse_direction(J + change * noise, c) - d) <= 100 * change * size
    assert unique >= 3 or (kind, c) in {("zero_row", 0.9), ("zero_row", 0.4)}


def test_conflict_averse_weights_of_a_mean_that_is_zero():
    assert conflict_averse_weights(np.zeros((2, 2)), 0.4).tolist() == [0, 0]
    assert conflict_averse_weights(np.array([[1.0, -1.0], [-1.0, 1.0]]), 0.4).tolist() == [0, 0]
    assert conflict_averse_weights(np.array([[1.0, -1.0], [-1.0, 1.0]]) + 1e-17, 2.0).tolist() == [0, 0]


def without_pivoting(monkeypatch):
    monkeypatch.setattr(conflict_averse, "pivot", lambda *args: (np.nan, None))


@pytest.mark.parametrize("c", [0.1, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["generic", "duplicate", "opposite", "zero_row", "stationary"])
def test_the_search_by_levels_takes_over_where_pivoting_fails(kind, c, monkeypatch):
    gradients = [make_jacobian(1 + seed, kind, seed).numpy() for seed in range(12)]
    expected = [conflict_averse_direction(J, c) for J in gradients]
    without_pivoting(monkeypatch)
    for J, d in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(conflict_averse_direction(J, c), d, atol=1e-9 * np.linalg.norm(J))


@pytest.mark.parametrize("pivoting", [True, False])
def test_the_mean_is_no_solution_where_a_wrong_set_of_tasks_reaches_its_level(pivoting, monkeypatch):
    """By hand: (1, 0) gains less than (1, 1) at their mean (1, 1/2), and the direction moves from the mean along (1, 0)."""
    if not pivoting:
        without_pivoting(monkeypatch)
    x = conflict_averse_weights(np.array([[1.0, 1.0], [1.0, 2.0]]), 0.4)
    assert x == pytest.approx([0.4 * 1.25**0.5, 0])


def test_conflict_averse_error_of_wrong_weights():
    J = make_jacobian(4, "generic", 0).numpy()
    G = J @ J.T
    x = conflict_averse_weights(G, 0.4)
    assert conflict_averse_error(G, x, 0.4) <= 1e-12
    assert conflict_averse_error(G, 0.9 * x, 0.4) > 1e-3  # could gain more
    assert conflict_averse_error(G, 1.1 * x, 0.4) == pytest.approx(0.1)  # beyond the radius
    assert conflict_averse_error(G, x - 0.1, 0.4) > 1e-2
    assert conflict_averse_error(np.zeros((2, 2)), np.zeros(2), 0.4) == 0
