import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import gradient_balancers
from balance.testing import make_jacobian
from tests.gradient.directions import STATIONARY, build, direction
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


HULL_KINDS = ("stationary", "opposite", "zero_row", "low_rank", "integer")  # kinds with 0 in the convex hull, or often so


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@given(jacobians(max_tasks=7, kinds=HULL_KINDS), st.sampled_from([0.1, 0.4, 0.9, 1.0, 1.5]))
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
    """A fallback to the mean would give (1/2, 0) for exactly opposite gradients, next to (3/10, 0) for all others."""
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


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_mgda_normalizations(normalization):
    """Weights of the shortest vector between gradients that are divided by length, loss, or both."""
    J, losses = make_jacobian(4, "generic", 0), torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    divisor = {"l2": J.norm(dim=1), "loss": losses, "loss+": losses * J.norm(dim=1)}[normalization]
    normalised = J / divisor[:, None]
    keywords = {} if normalization == "l2" else {"losses": losses}
    weights = build("mgda", 4, normalization=normalization)(J @ J.T, **keywords)
    torch.testing.assert_close(weights, build("mgda", 4)(normalised @ normalised.T))
    zero_row = make_jacobian(4, "zero_row", 0)
    assert build("mgda", 4, normalization=normalization)(zero_row @ zero_row.T, **keywords)[0] == 1


@pytest.mark.parametrize("losses", [None, torch.tensor([1.0, 0.0])])
def test_mgda_needs_positive_losses_to_divide_by(losses):
    with pytest.raises(ValueError, match="losses must be positive"):
        build("mgda", 2, normalization="loss")(torch.eye(2), losses=losses)


@pytest.mark.parametrize("J", [STATIONARY, [[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]]])
def test_cagrad_is_not_the_mean_whatever_the_scale_of_the_gradients(J):
    """The official solver returns the mean for all short gradients, and where 0 is in the convex hull."""
    J = torch.tensor(J, dtype=torch.float64)
    unit = build("cagrad", 3)(J @ J.T)
    assert (unit - unit.mean()).abs().max() > 0.01
    for scale in (1e-12, 1e-3, 1e3, 1e12):
        torch.testing.assert_close(build("cagrad", 3)(scale**2 * (J @ J.T)), unit)


def test_cagrad_is_the_mean_where_the_mean_is_zero_or_a_zero_gradient_is_all_that_gains_nothing():
    assert build("cagrad", 2)(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()).tolist() == pytest.approx([0.5 / 1.16] * 2)
    J = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    assert build("cagrad", 3)(J @ J.T).tolist() == pytest.approx([1 / 3 / 1.16] * 3)


@pytest.mark.parametrize("rescale", ["none", "paper", "bound"])
def test_cagrad_stays_within_its_radius(rescale):
    J = make_jacobian(5, "generic", 2)
    mean = J.mean(dim=0)
    d = direction("cagrad", J, c=0.7, rescale=rescale) * {"none": 1, "paper": 1 + 0.7**2, "bound": 1.7}[rescale]
    assert (d - mean).norm().item() == pytest.approx(0.7 * mean.norm().item())
    torch.testing.assert_close(direction("cagrad", J, c=0.0, rescale=rescale), mean)


@pytest.mark.parametrize(("number", "name"), list(enumerate(["none", "paper", "bound"])))
def test_numbers_of_the_papers_code_are_aliases_of_cagrads_rescale(number, name):
    J = make_jacobian(3, "generic", 0)
    assert torch.equal(direction("cagrad", J, rescale=number), direction("cagrad", J, rescale=name))
