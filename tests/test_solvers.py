from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balance.solvers.solvers import (
    bargaining_weights,
    conflict_averse_weights,
    equal_projection_weights,
    k_means_1d,
    min_norm_weights,
    square_root,
)
from tests.strategies import SEEDS, jacobians, make_jacobian


def relative_gap(G, w):
    """Duality gap of the min-norm problem over the squared length that it is about."""
    return (w @ G @ w - (G @ w).min()) / max(w @ G @ w, 1e-300)


@given(jacobians(max_tasks=10, kinds=("generic", "integer", "duplicate", "near_parallel")))
def test_min_norm_point_satisfies_the_kkt_conditions(J):
    G = (J @ J.T).numpy()
    w = min_norm_weights(G)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    v = w @ G @ w
    stationary = v <= 1e-10 * np.trace(G)
    assert stationary or relative_gap(G, w) <= 1e-9
    active = w > 1e-9
    assert stationary or (G @ w)[active] == pytest.approx(v, rel=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 3, 11, 40, 100])
@pytest.mark.parametrize("spread", [1, 30])
def test_min_norm_point_is_exact_at_unequal_scales(num_tasks, spread):
    scales = np.geomspace(1 / spread, spread, num_tasks)
    J = make_jacobian(num_tasks, "generic", 0).numpy() * scales[:, None]
    G = J @ J.T
    assert relative_gap(G, min_norm_weights(G)) <= 1e-10


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


@given(jacobians(max_tasks=10))
def test_square_root(J):
    G = (J @ J.T).numpy()
    R = square_root(G)
    assert pytest.approx(G, abs=1e-10 * np.trace(G)) == R.T @ R


def squared_error(points, labels):
    return sum(((points[labels == c] - points[labels == c].mean()) ** 2).sum() for c in set(labels.tolist()))


def brute_force(points, num_clusters):
    """Least error over all ways to give each point a label."""
    return min(
        squared_error(points, np.array(labels))
        for labels in product(range(num_clusters), repeat=len(points) - 1)
        for labels in [(0, *labels)]
    )


@given(seed=SEEDS, K=st.integers(1, 7), G=st.integers(1, 4), integer=st.booleans())
def test_k_means_is_optimal(seed, K, G, integer):
    random = np.random.default_rng(seed)
    points = random.integers(0, 4, K).astype(float) if integer else np.exp(random.normal(size=K))
    labels = k_means_1d(points, G)
    assert squared_error(points, labels) <= brute_force(points, G) + 1e-12
    assert len(set(labels.tolist())) <= G


def test_k_means_is_optimal_at_eight_points():
    points = np.exp(np.random.default_rng(0).normal(size=8))
    for clusters in range(1, 9):
        best = (
            min(
                squared_error(points, np.searchsorted(np.sort(points)[list(cut)], points, side="right"))
                for cut in combinations_with_replacement(range(1, 8), clusters - 1)
            )
            if clusters > 1
            else squared_error(points, np.zeros(8, dtype=int))
        )
        assert squared_error(points, k_means_1d(points, clusters)) == pytest.approx(best, abs=1e-12)
    assert squared_error(points, k_means_1d(points, 3)) <= brute_force(points, 3) + 1e-12


@given(seed=SEEDS, K=st.integers(1, 40), G=st.integers(1, 10))
def test_k_means_does_not_depend_on_the_order_and_is_sorted(seed, K, G):
    random = np.random.default_rng(seed)
    points = np.round(np.exp(random.normal(size=K)), 1)
    labels, order = k_means_1d(points, G), random.permutation(K)
    assert (k_means_1d(points[order], G) == labels[order]).all()
    ascending = labels[np.argsort(points)]
    assert (np.diff(ascending) >= 0).all()
    assert set(labels.tolist()) == set(range(min(G, len(set(points.tolist())))))


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e9, 1), (0, 1e-160), (0, 1e150), (-5, 1e-3)])
def test_k_means_far_from_zero_and_at_extreme_scales(offset, scale):
    points = (np.array([0.0, 1.0, 2.0, 10.0, 11.0]) + offset) * scale
    assert k_means_1d(points, 2).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("decades", [3, 8, 15])
def test_k_means_over_many_decades(decades):
    random = np.random.default_rng(0)
    for _ in range(30):
        points = 10.0 ** random.uniform(-decades, decades, 6)
        best = brute_force(points, 3)
        assert squared_error(points, k_means_1d(points, 3)) <= best * (1 + 1e-9)


def test_k_means_where_the_randomised_one_hangs():
    assert k_means_1d(np.array([1.0, 1.0, 2.0]), 2).tolist() == [0, 0, 1]
    assert k_means_1d(np.array([1.0, 1.0, 1.0]), 2).tolist() == [0, 0, 0]


# --- bargaining: alpha_k (G alpha)_k = 1 ------------------------------------------------------------------------------


def bargaining_residual(G, w):
    return np.abs(w * (G @ w) - 1).max()


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
        assert bargaining_residual(G, w) <= 1e-8


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11, 40, 100])
@pytest.mark.parametrize("spread", [1, 1e15])
def test_bargaining_is_exact_at_unequal_scales(num_tasks, spread):
    scales = np.geomspace(1 / spread, spread, num_tasks)
    J = make_jacobian(num_tasks, "generic", 1).numpy() * scales[:, None]
    G = J @ J.T
    assert bargaining_residual(G, bargaining_weights(G)) <= 1e-8


@pytest.mark.parametrize("G", [[[5.0, -5.0], [-5.0, 5.0]], [[20.0, 4, -18], [4, 40, -12], [-18, -12, 18]]])
def test_bargaining_has_no_solution_at_a_pareto_stationary_point(G):
    assert bargaining_weights(np.array(G)) is None


# --- CAGrad: a direction and a bound on what any direction can reach --------------------------------------------------


def conflict_averse_direction(J, c):
    """CAGrad's direction, without rescaling."""
    return (1 / len(J) + conflict_averse_weights(J @ J.T, c)) @ J


def assert_solves_the_published_problem(J, c, tolerance=1e-9):
    """Check the certificate: the direction is within the radius, and a dual point shows that no direction reaches more.

    For weights w on the simplex no direction within the radius has a worst gain above w'Gb + c |g0| |J'w|.
    """
    G, mean = J @ J.T, J.mean(axis=0)
    x = conflict_averse_weights(G, c)
    assert (x >= 0).all()
    radius = c * np.linalg.norm(mean)
    scale = np.linalg.norm(J, axis=1).max() * max(np.linalg.norm(mean), 1e-300)
    assert np.linalg.norm(x @ J) <= radius * (1 + 1e-7) + 1e-9 * np.linalg.norm(J)
    candidates = [min_norm_weights(G), *([x / x.sum()] if x.any() else [])]
    bound = min(w @ J @ mean + radius * np.linalg.norm(w @ J) for w in candidates)
    assert (J @ (mean + x @ J)).min() >= bound - tolerance * max(1, c) * scale


@pytest.mark.parametrize("c", [0.01, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 40, 100])
def test_conflict_averse_weights_solve_the_published_problem(num_tasks, c):
    for seed in range(20 if num_tasks < 40 else 4):
        assert_solves_the_published_problem(make_jacobian(num_tasks, "generic", seed).numpy(), c)


@given(jacobians(max_tasks=10), st.sampled_from([0.01, 0.4, 0.9, 1.0, 5.0]))
def test_conflict_averse_weights_solve_the_published_problem_of_dependent_gradients(J, c):
    assert_solves_the_published_problem(J.numpy(), c, tolerance=1e-6)


@given(SEEDS, st.integers(2, 9), st.sampled_from([0.1, 0.4, 0.9]))
def test_conflict_averse_weights_with_more_tasks_than_parameters(seed, num_tasks, c):
    J = np.random.default_rng(seed).normal(size=(num_tasks, max(1, num_tasks // 2)))
    assert_solves_the_published_problem(J, c)


@given(jacobians(kinds=("stationary", "opposite", "zero_row", "low_rank", "integer")), st.sampled_from([0.2, 1.0, 2.0]))
def test_conflict_averse_direction_is_the_nearest_of_several_solutions(J, c):
    """Where the worst gain is 0, the direction is the projection of the mean on the dual cone: Moreau's conditions."""
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


# --- IMTL-G: C x = 1 ---------------------------------------------------------------------------------------------------


@given(jacobians(kinds=("generic",)))
def test_equal_projections_satisfy_their_equation(J):
    G = (J @ J.T).numpy()
    norms = np.sqrt(np.diag(G))
    assert G / norms[:, None] / norms @ equal_projection_weights(G) == pytest.approx(np.ones(len(G)), abs=1e-7)


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
