import numpy as np
import pytest
import torch

from balance.testing import make_jacobian
from tests.gradient.directions import STATIONARY, build, direction


def test_nash_has_no_common_bargain_at_a_stationary_point():
    J = torch.tensor(STATIONARY, dtype=torch.float64)
    assert build("nashmtl", 3)(J @ J.T).tolist() == [0, 0, 0]
    assert direction("mgda", STATIONARY).abs().max() < 1e-9


def test_nash_weights_are_never_stale():
    """The official solver keeps earlier weights when it fails, which it does for short gradients."""
    rule = build("nashmtl", 3, max_norm=None)
    for scale in (1.0, 1e-4, 1e4):
        J = scale * torch.tensor([[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]], dtype=torch.float64)
        weights = rule(J @ J.T)
        torch.testing.assert_close(weights * (J @ J.T @ weights), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0, None])
def test_nash_direction_has_length_root_k_or_max_norm(max_norm):
    d = direction("nashmtl", make_jacobian(5, "generic", 0), max_norm=max_norm)
    assert d.norm().item() == pytest.approx(min(5**0.5, max_norm or np.inf))


def test_fairgrad_with_alpha_one_is_the_unshortened_bargain():
    J = make_jacobian(5, "generic", 0)
    torch.testing.assert_close(build("fairgrad", 5, alpha=1.0)(J @ J.T), build("nashmtl", 5, max_norm=None)(J @ J.T))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 10.0, 100.0])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_fairgrad_satisfies_its_equation_at_any_scale(alpha, scale):
    for seed in range(5):
        J = scale * make_jacobian(6, "generic", seed)
        weights = build("fairgrad", 6, alpha=alpha)(J @ J.T)
        assert (weights > 0).all()
        residual = weights ** (1 / alpha) * (J @ J.T @ weights)
        torch.testing.assert_close(residual, torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


def test_small_alpha_is_near_the_sum_and_large_alpha_raises_the_smallest_gain():
    J = make_jacobian(4, "generic", 2)
    worst = []
    for alpha in (0.1, 0.5, 1.0, 2.0, 10.0, 100.0):
        d = direction("fairgrad", J, alpha=alpha)
        worst.append(float((J @ (d / d.norm())).min()))
    assert worst == sorted(worst)
    d = direction("mgda", J)
    assert worst[-1] == pytest.approx(float((J @ (d / d.norm())).min()), rel=0.05)


def test_fairgrad_has_no_solution_at_a_stationary_point():
    J = torch.tensor(STATIONARY, dtype=torch.float64)
    for alpha in (0.5, 2.0, 10.0):
        assert build("fairgrad", 3, alpha=alpha)(J @ J.T).tolist() == [0, 0, 0]
