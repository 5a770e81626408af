import cvxpy as cp
import numpy as np
import pytest
import torch

from balance import Balancer
from balance.testing import KINDS, make_jacobian
from tests.gradient.directions import build, direction


def by_cvxpy(J, tau):
    """Return PCD's direction of a first step, from the primal problem; None if it has no solution."""
    units = (J / J.norm(dim=1, keepdim=True)).numpy()
    d = cp.Variable(J.shape[1])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(d - units[0])), [units[1:] @ d >= tau] if len(J) > 1 else [])
    problem.solve(solver=cp.CLARABEL)
    if problem.status != cp.OPTIMAL:
        return None
    return float(J[0].norm()) * d.value / np.linalg.norm(d.value)


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_pcd_solves_its_quadratic_program(num_tasks, tau):
    for seed in range(5):
        J = make_jacobian(num_tasks, "generic", seed)
        np.testing.assert_allclose(direction("pcd", J, tau=tau).numpy(), by_cvxpy(J, tau), atol=1e-5 * float(J[0].norm()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("generic", "zero_row")])
def test_pcd_of_dependent_gradients(kind):
    for num_tasks, seed in ((3, 0), (4, 1), (6, 2)):
        J = make_jacobian(num_tasks, kind, seed)
        expected = by_cvxpy(J, 0.02) if (J.norm(dim=1) > 0).all() else None
        if expected is not None:
            np.testing.assert_allclose(direction("pcd", J).numpy(), expected, atol=1e-3 * float(J[0].norm()))


def test_pcd_drops_conditions_that_contradict_each_other():
    J = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
    assert direction("pcd", J).tolist() == [1, 0]
    nearly = torch.tensor([[1.0, 0.0], [1e-9, 2.0], [1e-9, -1.0]], dtype=torch.float64)
    assert direction("pcd", nearly).tolist() == [1, 0]


def test_pcd_normalises_by_the_average_length():
    """A second gradient ten times as long as usual asks for ten times the progress."""
    rule = build("pcd", 2, beta=0.999, tau=0.02)
    usual = torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64))
    for _ in range(5000):
        rule(usual)
    weights = rule(torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64)))
    steps = 5001
    typical = ((1 - 0.999**5000) * 0.999 + 0.001 * 100) / (1 - 0.999**steps)
    level = 0.02 * 10 / typical**0.5
    assert (weights[1] / weights[0] * 10).item() == pytest.approx(level, rel=1e-9)


def test_pcd_needs_its_primary_task():
    with pytest.raises(ValueError, match="primary task of 'pcd', number 0, must be present"):
        build("pcd", 3)(torch.eye(2), present=torch.tensor([1, 2]))
    assert build("pcd", 3)(torch.eye(1), present=torch.tensor([0])).tolist() == [1]


def test_pcd_scaling_a_secondary_loss_has_no_effect():
    J = make_jacobian(3, "generic", 0)
    scaled = J * torch.tensor([[1.0], [100.0], [0.01]], dtype=torch.float64)
    torch.testing.assert_close(direction("pcd", scaled), direction("pcd", J))


def test_cr_mogm_is_smoothed_if_its_weight_is_constant():
    from balance import compose

    ours, composed = build("cr_mogm", 3, rule="pcgrad", alpha=0.7), compose.smoothed("pcgrad", 0.7, 3)
    for step in range(4):
        J = make_jacobian(3, "generic", step)
        torch.testing.assert_close(ours(J @ J.T), composed(J @ J.T), rtol=1e-14, atol=0)


def test_cr_mogm_reuses_and_passes_the_losses_of_its_rule():
    rule = build("cr_mogm", 2, rule="ntk")
    weights = rule(torch.eye(2, dtype=torch.float64), losses=torch.tensor([1.0, 4.0]))
    assert weights.tolist() == [1.25, 5]
    assert repr(rule).startswith("smoothed(ntk")


def test_cr_mogm_takes_the_seed_of_the_stage():
    rules = [Balancer(4, gradient="cr_mogm", gradient_options={"rule": "pcgrad"}, seed=seed) for seed in (0, 0, 1)]
    J = torch.tensor([[1.0, 3.0, 1.0], [-3.0, 3.0, -3.0], [0.0, -3.0, 0.0], [1.0, -2.0, 2.0]], dtype=torch.float64)
    weights = []
    for balancer in rules:
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            report = balancer.backward(J @ theta + 1, shared=[theta])
        weights.append(report.gradient_weights)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
