import torch

from balance.testing import make_jacobian
from tests.gradient.directions import STATIONARY, direction


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_the_direction_is_as_long_as_the_mean_and_in_the_cone():
    for seed in range(20):
        J = make_jacobian(5, "generic", seed)
        for c in (0.1, 0.5, 0.95):
            d, mean = direction("conicgrad", J, c=c), J.mean(dim=0)
            torch.testing.assert_close(d.norm(), mean.norm())
            assert cosine(d, mean) >= c - 1e-9


def test_a_cone_of_no_width_is_the_mean():
    J = make_jacobian(5, "generic", 0)
    torch.testing.assert_close(direction("conicgrad", J, c=1.0), J.mean(dim=0))
    torch.testing.assert_close(direction("conicgrad", J, c=1 - 1e-14), J.mean(dim=0), rtol=1e-5, atol=1e-5)


def test_a_wide_cone_is_mgda_with_the_length_of_the_mean():
    J = make_jacobian(5, "generic", 0)
    mgda = direction("mgda", J)
    torch.testing.assert_close(direction("conicgrad", J, c=1e-6), mgda * J.mean(dim=0).norm() / mgda.norm())


def test_the_mean_where_no_direction_helps_every_task():
    J = torch.tensor(STATIONARY, dtype=torch.float64)
    torch.testing.assert_close(direction("conicgrad", J), J.mean(dim=0))
