from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance.solvers import kmeans
from tests.strategies import SEEDS


def k_means_1d(points, num_clusters):
    return kmeans.k_means_1d(torch.from_numpy(points), num_clusters).numpy()


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


@given(seed=SEEDS, K=st.integers(2, kmeans.FEW), G=st.integers(2, 13), decimals=st.integers(0, 2))
def test_loops_over_few_points_find_the_clusters_of_the_form_for_any_device(seed, K, G, decimals):
    """Also where points are equal, and where clusterings are equally good, as of 0, 1, 2."""
    points = np.round(np.random.default_rng(seed).uniform(0, 4, K), decimals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "FEW", 0)
        expected = k_means_1d(points, G)
    assert k_means_1d(points, G).tolist() == expected.tolist()


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
