"""Rules for physics-informed networks: the estimate of the trace, absent tasks and zero gradients."""

import pytest
import torch

from balance import Balancer
from balance.rules.context import TaskError
from balance.testing import make_jacobian
from tests.gradient.directions import build


def linear_task(inputs, seed):
    """Return loss and gradient of a linear model, and the trace of its kernel. The loss is a mean of squares."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(inputs.shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(len(inputs), generator=generator, dtype=torch.float64)
    loss = (inputs @ theta - targets).square().mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return loss.detach(), gradient, float((inputs @ inputs.T).trace())


def of_two(first, second, **options):
    (loss_1, g_1, trace_1), (loss_2, g_2, trace_2) = first, second
    J = torch.stack([g_1, g_2])
    weights = build("ntk", 2, **options)(J @ J.T, losses=torch.stack([loss_1, loss_2]))
    return weights, (trace_1 + trace_2) / torch.tensor([trace_1, trace_2], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_ntk_weights_are_the_papers_if_gradients_of_residuals_are_orthogonal_and_of_one_length(seed):
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    weights, exact = of_two(linear_task(2 * Q[:3], seed), linear_task(0.5 * Q[1:4], seed + 10))
    torch.testing.assert_close(weights, exact)
    weights, exact = of_two(linear_task(2 * Q[:4], seed), linear_task(0.5 * Q[:2], seed + 10), residuals=[4, 2])
    torch.testing.assert_close(weights, exact)
    weights, exact = of_two(linear_task(3 * Q[:1], seed), linear_task(Q[2:3], seed + 10))  # one residual each
    torch.testing.assert_close(weights, exact)


def test_ntk_estimate_lies_between_the_bounds_of_the_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        inputs = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        loss, gradient, _ = linear_task(inputs, seed)
        values = torch.linalg.eigvalsh(inputs @ inputs.T)
        t = 25 * gradient @ gradient / (4 * loss)
        assert 5 * values[0] <= t <= 5 * values[-1]


def test_ntk_estimate_is_the_trace_on_average_over_residuals_of_one_variance():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 60, generator=generator, dtype=torch.float64)
    kernel = inputs @ inputs.T
    residuals = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    quotients = 50 * ((residuals @ kernel) * residuals).sum(dim=1) / residuals.square().sum(dim=1)
    assert quotients.mean().item() == pytest.approx(float(kernel.trace()), rel=0.01)


def test_ntk_refuses_losses_that_are_no_means_of_squares():
    G = torch.eye(2, dtype=torch.float64)
    with pytest.raises(TaskError, match="'1' is 0, but its gradient is not"):
        build("ntk", 2)(G, losses=torch.tensor([1.0, 0.0]))
    with pytest.raises(TaskError, match="'0' is -1, but must not be negative"):
        build("ntk", 2)(G, losses=torch.tensor([-1.0, 1.0]))
    at_optimum = build("ntk", 2)(torch.diag(torch.tensor([4.0, 0.0])), losses=torch.tensor([1.0, 0.0]))
    assert at_optimum.tolist() == [1, 0]


def test_ntk_uses_the_residuals_of_the_present_tasks():
    J = make_jacobian(2, "generic", 0)
    rule = build("ntk", 3, residuals=[3, 7, 5])
    losses = torch.tensor([1.0, 2.0])
    expected = build("ntk", 2, residuals=[3, 5])(J @ J.T, losses=losses)
    assert torch.equal(rule(J @ J.T, losses=losses, present=torch.tensor([0, 2])), expected)


def test_a_zero_gradient_keeps_its_weight():
    rule = build("inverse_norm", 2, beta=0.0)
    assert rule(torch.diag(torch.tensor([1.0, 9.0]))).tolist() == pytest.approx([4, 4 / 3])
    assert rule(torch.diag(torch.tensor([0.0, 9.0]))).tolist() == pytest.approx([4, 1])
    annealing = build("lr_annealing", 2, beta=0.0)
    annealing(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert annealing(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist() == [2, 0]
    assert annealing.weights.tolist() == [1, 4]


def test_the_main_task_must_be_present():
    with pytest.raises(ValueError, match="main task of 'lr_annealing', number 1, must be present"):
        build("lr_annealing", 3, main_task=1)(torch.ones(2, 4), present=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="shape"):
        build("lr_annealing", 3)(torch.ones(3))


@pytest.mark.parametrize(
    "name", ["lr_annealing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inverse_norm", "ntk"))]
)
def test_a_poisson_like_problem_is_solved(name):
    """A residual that is a thousand times larger than a boundary condition, in two parameters."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    balancer = Balancer(("residual", "boundary"), gradient=name, scale="norm" if name == "lr_annealing" else "sum")
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        losses = {"residual": 1000 * (theta[0] + theta[1] - 1).square(), "boundary": (theta[1] - 3).square()}
        balancer.backward(losses, shared=[theta])
        optimizer.step()
    assert theta.tolist() == pytest.approx([-2, 3], abs=0.05)
