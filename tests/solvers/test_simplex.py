import numpy as np
import pytest
from scipy.optimize import minimize

from balance.solvers.simplex import project_on_simplex


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_projection_is_the_nearest_point(num_tasks, scale):
    """Optimal: the distances are equal where the weight is positive, and no smaller elsewhere."""
    for seed in range(20):
        v = scale * np.random.default_rng(seed).normal(size=num_tasks)
        w = project_on_simplex(v)
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1)
        excess = v - w
        assert np.ptp(excess[w > 0]) <= 1e-12 * max(1, scale)
        assert (excess[w == 0] <= excess[w > 0].max() + 1e-12 * max(1, scale)).all()


def test_projection_agrees_with_a_general_solver():
    v = np.array([0.9, 0.4, -0.2])
    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = minimize(lambda w: ((w - v) ** 2).sum(), np.ones(3) / 3, bounds=[(0, None)] * 3, constraints=[simplex])
    np.testing.assert_allclose(project_on_simplex(v), found.x, atol=1e-6)
    np.testing.assert_allclose(project_on_simplex(v), [0.75, 0.25, 0])


def test_points_of_the_simplex_stay_and_large_numbers_lose_nothing():
    np.testing.assert_allclose(project_on_simplex(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])
    np.testing.assert_allclose(project_on_simplex(1e17 + np.array([0.0, 0.0])), [0.5, 0.5])
    assert project_on_simplex(np.array([-1e30, 1e30])).tolist() == [0, 1]
