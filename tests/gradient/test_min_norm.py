import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import gradient_balancers
from tests.strategies import SEEDS, jacobians


@given(jacobians())
def test_mgda_direction_gains_at_least_its_squared_length_on_every_task(J):
    d = gradient_balancers.build("mgda")(J @ J.T) @ J
    assert (J @ d >= d @ d - 1e-9 * J.norm() ** 2).all()
    assert d.norm() <= J.norm(dim=1).min() * (1 + 1e-9) + 1e-9 * J.norm()


def test_mgda_two_tasks_closed_form():
    for angle in torch.linspace(0.1, 3.1, 13, dtype=torch.float64):
        J = torch.stack([torch.tensor([2.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])])
        G = J @ J.T
        first = ((G[1, 1] - G[0, 1]) / (G[0, 0] + G[1, 1] - 2 * G[0, 1])).clamp(0, 1)
        weights = gradient_balancers.build("mgda")(G)
        torch.testing.assert_close(weights, torch.stack([first, 1 - first]), rtol=1e-9, atol=1e-12)


def test_mgda_gives_all_weight_to_a_zero_gradient():
    assert gradient_balancers.build("mgda")(torch.diag(torch.tensor([0.0, 1.0]))).tolist() == [1, 0]


def cagrad_direction(J, **options):
    return gradient_balancers.build("cagrad", rescale=0, **options)(J @ J.T) @ J


STATIONARY = ("stationary", "opposite", "zero_row", "low_rank", "integer")  # kinds with 0 in the convex hull, or often so


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@given(jacobians(max_tasks=7, kinds=STATIONARY), st.sampled_from([0.1, 0.4, 0.9, 1.0, 1.5]))
def test_cagrad_agrees_with_cvxpy_where_0_is_in_the_convex_hull(J, c):
    """The oracle solves the primal problem, and the exact solver neither this problem nor the dual one."""
    difference = cagrad_direction(J, c=c) - cagrad_direction(J, c=c, solver="cvxpy")
    assert difference.norm() <= 3e-3 * max(1, c) * J.mean(dim=0).norm() + 1e-6 * J.norm()


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@given(SEEDS, st.integers(2, 8), st.sampled_from([0.1, 0.4, 0.9, 1.0]))
def test_cagrad_agrees_with_cvxpy_for_more_tasks_than_parameters(seed, num_tasks, c):
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(num_tasks, max(1, num_tasks - 2), generator=generator, dtype=torch.float64)
    difference = cagrad_direction(J, c=c) - cagrad_direction(J, c=c, solver="cvxpy")
    assert difference.norm() <= 3e-3 * max(1, c) * J.mean(dim=0).norm() + 1e-6 * J.norm()


def test_cagrad_does_not_jump_where_0_leaves_the_convex_hull():
    """An earlier version returned the mean (1/2, 0) for exactly opposite gradients, and (3/10, 0) for all others."""
    for height in (0.0, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4):
        J = torch.tensor([[2.0, height], [-1.0, height]], dtype=torch.float64)
        assert cagrad_direction(J).tolist() == pytest.approx([0.3, 1.2 * height], abs=1e-8)


def test_cagrad_of_a_gramian_in_low_precision_treats_rounding_as_zero():
    """Rounding to float32 leaves a few 1e-8 of a combination of gradients that is zero; dividing by it gives huge weights."""
    for seed in range(30):
        J = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).double()
        weights = gradient_balancers.build("cagrad", c=2.0, rescale=0)((J @ J.T).float()).double()
        lengths = J.norm(dim=1)
        assert (J @ (weights @ J) >= -1e-4 * lengths * J.norm()).all()
        assert weights @ lengths <= 1e4 * J.norm()
