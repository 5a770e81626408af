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
