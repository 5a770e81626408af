import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch

from balance import Balancer
from balance.rules.context import TaskError
from balance.testing import make_jacobian
from tests.gradient.directions import build


def epo_by_cvxpy(G, L, p):
    """Return the value of the objective of EPO's linear program at its optimum, and the objective, by cvxpy.

    Written from the paper's eq. (24), with the gradients' inner products.
    """
    shares = p * L / (p @ L)
    mu = float(shares @ np.log(len(G) * shares))
    anchor = p * (np.log(len(G) * shares) - mu)
    w = cp.Variable(len(G), nonneg=True)
    conditions = [cp.sum(w) == 1]
    if mu > 1e-4:
        objective = G @ anchor
        has_rising = (objective > 0).any()
        for task in range(len(G)):
            if task == shares.argmax():
                conditions.append(G[task] @ w >= 0)
            elif not objective[task] > 0:
                conditions.append(G[task] @ w >= (objective[task] if has_rising else 0))
    else:
        objective = G.sum(axis=0)
        conditions += [G @ w >= 0]
        if np.abs(anchor).max() > 1e-9:
            conditions.append((G @ anchor) @ w >= min(0, (G @ anchor).max()))
    problem = cp.Problem(cp.Maximize(objective @ w), conditions)
    problem.solve(solver=cp.CLARABEL)
    if problem.status != cp.OPTIMAL:  # the last condition is relaxed
        problem = cp.Problem(cp.Maximize(objective @ w), conditions[:-1])
        problem.solve(solver=cp.CLARABEL)
    return problem.value, objective


def losses_of(num_tasks, seed):
    return np.random.default_rng(seed).uniform(0.5, 3, num_tasks)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("distance", [None, 1e-3, 0.0])
def test_epo_solves_its_linear_program(num_tasks, distance):
    for seed in range(8):
        J = make_jacobian(num_tasks, "generic", seed)
        G, p = (J @ J.T).numpy(), np.random.default_rng(seed + 1).uniform(0.5, 2, num_tasks)
        L = losses_of(num_tasks, seed)
        if distance is not None:
            L = (1 + distance * L) / p  # on the ray, or within the tolerance
        rule = build("epo", num_tasks, preference=p.tolist())
        weights = rule(J @ J.T, losses=torch.from_numpy(L)).numpy()
        value, objective = epo_by_cvxpy(G, L, p)
        assert objective @ weights == pytest.approx(value, rel=1e-6, abs=1e-6 * G.max())
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)


def test_epo_of_two_tasks_by_brute_force():
    for seed, L in itertools.product(range(5), ([1.0, 2.0], [3.0, 1.0])):
        J = make_jacobian(2, "opposite" if seed == 4 else "generic", seed)
        G = (J @ J.T).numpy()
        grid = np.linspace(0, 1, 100_001)
        W = np.stack([1 - grid, grid])
        shares = np.array(L) / sum(L)
        mu = shares @ np.log(2 * shares)
        gains = G @ (np.log(2 * shares) - mu)
        bounds = np.where(gains > 0, -np.inf, gains) if (gains > 0).any() else np.zeros(2)
        bounds[shares.argmax()] = 0
        values = np.where((bounds[:, None] - 1e-9 * G.max() <= G @ W).all(axis=0), gains @ W, -np.inf)
        weights = build("epo", 2)(J @ J.T, losses=torch.tensor(L)).numpy()
        assert gains @ weights == pytest.approx(values.max(), rel=1e-4, abs=1e-9)


def test_pmgda_solves_its_linear_program():
    for num_tasks, seed in itertools.product((2, 3, 6), range(5)):
        J = make_jacobian(num_tasks, "generic", seed).numpy()
        L = losses_of(num_tasks, seed)
        ray = np.ones(num_tasks) / np.sqrt(num_tasks)
        offset = L - (L @ ray) * ray
        slope = J.T @ offset / np.linalg.norm(offset)
        unit = np.vstack([J / np.linalg.norm(J, axis=1, keepdims=True), slope / np.linalg.norm(slope)])
        mu = cp.Variable(num_tasks + 1, nonneg=True)
        d = unit.T @ mu
        problem = cp.Problem(cp.Maximize(cp.min(J @ d)), [cp.sum(mu) == 1, unit[-1] @ d >= 0.8])
        problem.solve(solver=cp.CLARABEL)
        weights = build("pmgda", num_tasks)(torch.from_numpy(J @ J.T), losses=torch.from_numpy(L)).numpy()
        assert (J @ (J.T @ weights)).min() == pytest.approx(problem.value, rel=1e-5, abs=1e-6)
        assert unit[-1] @ (J.T @ weights) >= 0.8 - 1e-7


def test_pmgda_predicts_along_the_level_set():
    """The direction is orthogonal to the gradient of the distance, and no combination of the parts is shorter."""
    for num_tasks, seed in itertools.product((2, 3, 5), range(5)):
        J = make_jacobian(num_tasks, "generic", seed).numpy()
        L = 1 + 1e-3 * losses_of(num_tasks, seed)
        offset = L - L.mean()
        slope = J.T @ offset
        d = J.T @ build("pmgda", num_tasks)(torch.from_numpy(J @ J.T), losses=torch.from_numpy(L)).numpy()
        assert abs(slope @ d) <= 1e-9 * np.linalg.norm(slope) * np.linalg.norm(J)
        parts = J - np.outer(J @ slope, slope) / (slope @ slope)
        assert (parts @ d).min() >= d @ d - 1e-9 * np.linalg.norm(J) ** 2


@pytest.mark.parametrize("name", ["epo", "pmgda"])
def test_degenerate_input(name):
    rule = build(name, 3, preference=[1.0, 2.0, 3.0])
    J = make_jacobian(2, "generic", 0)
    losses = torch.tensor([1.0, 0.4])
    expected = build(name, 2, preference=[1.0, 3.0])(J @ J.T, losses=losses)
    assert torch.equal(rule(J @ J.T, losses=losses, present=torch.tensor([0, 2])), expected)
    zero = torch.zeros(3, 3)
    assert rule(zero, losses=torch.tensor([1.0, 2.0, 3.0])).tolist() == [0, 0, 0]
    zero[0, 0] = 4.0
    assert rule(zero, losses=torch.tensor([3.0, 1.0, 0.1]))[1:].tolist() == [0, 0]
    opposite = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    weights = build(name, 2)(opposite, losses=torch.tensor([1.0, 3.0]))
    assert weights.isfinite().all()
    with pytest.raises(TaskError, match="'1' is -1"):
        rule(torch.eye(3), losses=torch.tensor([1.0, -1.0, 1.0]))


def concave(theta):
    """The two objectives of the papers' example, whose Pareto front is concave. Shape (n,) -> (2,)."""
    shift = len(theta) ** -0.5
    return torch.stack([1 - (-(theta - shift).square().sum()).exp(), 1 - (-(theta + shift).square().sum()).exp()])


@pytest.mark.parametrize(
    "preference", [[1.0, 3.0], *(pytest.param(values, marks=pytest.mark.slow) for values in ([1.0, 1.0], [2.0, 1.0]))]
)
@pytest.mark.parametrize(("name", "options"), [("epo", {"tolerance": 1e-5}), ("pmgda", {"tolerance": 2e-3})])
def test_training_ends_on_the_ray_of_a_concave_front(name, options, preference):
    """Weighted sums end at an end of this front; these rules end where preference times loss is equal, and on the front."""
    theta = torch.linspace(-0.4, 0.5, 8, dtype=torch.float64).requires_grad_()
    balancer = Balancer(2, gradient=name, gradient_options={"preference": preference} | options)
    optimizer = torch.optim.SGD([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for _ in range(700):
        optimizer.zero_grad()
        balancer.backward(concave(theta), shared=[theta])
        optimizer.step()
        schedule.step()
    first, second = (concave(theta).detach() * torch.tensor(preference)).tolist()
    assert first == pytest.approx(second, rel=0.02)
    assert theta.std().item() < 0.03  # the Pareto set is the segment of equal coordinates
    assert abs(theta.mean().item()) <= 8**-0.5 + 1e-3
