from itertools import islice, permutations

import pytest
import torch

from balance import Balancer, gradient_balancers
from balance.testing import make_jacobian
from tests.gradient.directions import build, direction


def dependent(num_tasks, num_parameters, dtype, seed):
    """Return random gradients of rank K - 1 or less, up to the rounding of the dtype. Shape (K, P)."""
    generator = torch.Generator().manual_seed(seed)
    if num_parameters < num_tasks:
        return torch.randn(num_tasks, num_parameters, generator=generator, dtype=dtype)
    left = torch.randn(num_tasks, num_tasks - 1, generator=generator, dtype=dtype)
    return left @ torch.randn(num_tasks - 1, num_parameters, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "num_tasks", "num_parameters", "every"),
    [(torch.float64, 4, 3, 1), (torch.float32, 4, 50, 1), (torch.float32, 8, 50, 2000)],
)
def test_imtl_of_dependent_gradients_does_not_depend_on_the_order_of_the_tasks(dtype, num_tasks, num_parameters, every):
    """A pivoted factorisation gives, in some orders, a direction of length 1e-7, which trains nothing."""
    for seed in range(8):
        J = dependent(num_tasks, num_parameters, dtype, seed)
        directions = []
        for order in islice(permutations(range(num_tasks)), 0, None, every):
            parameter = torch.zeros(num_parameters, dtype=dtype, requires_grad=True)
            Balancer(num_tasks, gradient="imtl").backward(J[list(order)] @ parameter, shared=[parameter])
            directions.append(parameter.grad)
        length = directions[0].norm()
        assert length > 0.01
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert all((direction - directions[0]).norm() <= tolerance * length for direction in directions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_imtl_of_a_gramian_in_low_precision_does_not_depend_on_the_order_of_the_tasks(dtype):
    """The cutoff follows the precision of the Gramian: what its rounding makes of an eigenvalue of zero is not solved for."""
    rule = gradient_balancers.build("imtl")
    for seed in range(30):
        J = dependent(5, 3, torch.float64, seed)
        G, order = (J @ J.T).to(dtype), torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        a, b = rule(G)[order], rule(G[order][:, order])
        torch.testing.assert_close(a, b)
        assert a.double().norm() <= 100 / J.norm(dim=1).min()


def test_imtl_weights_stay_bounded_where_their_sum_is_zero():
    """The formula divides by the sum, and has no limit there; whether it is +1e-17 or -1e-17 depends on the order."""
    rule = gradient_balancers.build("imtl")
    lengths = torch.tensor([1.0, 10.0, 10.0], dtype=torch.float64)
    for change in (0.0, 1e-15, -1e-15, 1e-12, -1e-9):
        # With cosines a of the first gradient with the others and b between these, x is as 1 + b - 2a : 1 - a : 1 - a.
        a = 0.7
        b = 2 * a - 1 - 0.2 * (1 - a) + change
        C = torch.tensor([[1, a, a], [a, 1, b], [a, b, 1]], dtype=torch.float64)
        G = C * lengths * lengths[:, None]
        weights = rule(G)
        swapped = rule(G[[2, 0, 1]][:, [2, 0, 1]])[[1, 2, 0]]
        torch.testing.assert_close(weights, swapped)
        assert weights.abs().sum().item() == pytest.approx(1, rel=1e-3)


def test_imtl_of_opposite_gradients_is_zero_in_every_order():
    for scale in (1.0, 3.0, 1e-4):
        J = torch.tensor([[1.0, 2.0], [-scale, -2 * scale]], dtype=torch.float64)
        for rows in (J, J.flip(0)):
            assert gradient_balancers.build("imtl")(rows @ rows.T).tolist() == [0, 0]


def test_config_has_the_orientation_of_imtl_and_the_sum_of_projections_as_length():
    for seed in range(5):
        J = make_jacobian(5, "generic", seed)
        d, imtl = direction("config", J), direction("imtl", J)
        torch.testing.assert_close(d / d.norm(), imtl / imtl.norm())
        torch.testing.assert_close(d.norm(), (J @ d / d.norm()).sum())


def test_config_has_cosines_in_the_ratio_of_the_preferences():
    J = make_jacobian(4, "generic", 0)
    preference = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    d = direction("config", J, preference=preference.tolist())
    cosines = J @ d / J.norm(dim=1) / preference
    torch.testing.assert_close(cosines, cosines.mean().expand(4))


def test_config_with_the_length_of_a_task():
    J = make_jacobian(3, "generic", 0)
    rule = build("config", 4, length=2)
    smaller = build("config", 3, length=1)(J @ J.T)
    torch.testing.assert_close(rule(J @ J.T, present=torch.tensor([0, 2, 3])), smaller)
    projection = build("config", 3)(J @ J.T)
    torch.testing.assert_close(rule(J @ J.T, present=torch.tensor([0, 1, 3])), projection)  # the task is absent
    J[2] = 0
    torch.testing.assert_close(build("config", 3, length=2)(J @ J.T), build("config", 3)(J @ J.T))


LENGTHS = {"projection": 2, "minimum": 1, "maximum": 3, "harmonic": 1.5, "arithmetic": 2, "geometric": 3**0.5}


@pytest.mark.parametrize(("length", "mean"), LENGTHS.items())
def test_config_of_orthogonal_gradients_has_the_mean_length_at_every_coordinate(length, mean):
    """By hand: the unit direction is (1, 1) / sqrt(2), and the projections on it sum to sqrt(2) times the mean length."""
    J = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert direction("config", J, length=length).tolist() == pytest.approx([mean, mean])
