import copy

import pytest
import torch

from balance.rules.context import TaskError
from balance.testing import make_jacobian
from tests.gradient.directions import build

NAMES = ["gradnorm", "ema_norm", "inverse_norm", "sdmgrad", "modo", "pcd", "cr_mogm"]


def gramian(num_tasks, seed):
    J = make_jacobian(num_tasks, "generic", seed)
    return J @ J.T


@pytest.mark.parametrize("name", NAMES)
def test_a_task_that_is_never_present_is_the_smaller_problem(name):
    larger, smaller = build(name, 3), build(name, 2)
    for step in range(4):
        G = gramian(2, step)
        torch.testing.assert_close(larger(G, present=torch.tensor([0, 2])), smaller(G))


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_task_keeps_its_state(name):
    rule = build(name, 3)
    rule(gramian(3, 0))
    before = copy.deepcopy(rule.state_dict())
    rule(gramian(2, 1), present=torch.tensor([0, 2]))
    now = rule.state_dict()
    assert all(torch.equal(value[1].nan_to_num(), before[key][1].nan_to_num()) for key, value in now.items())
    changed = any(not torch.equal(value, before[key]) for key, value in now.items())
    assert changed or name == "sdmgrad"  # whose weight is all with the absent task here


@pytest.mark.parametrize("name", NAMES)
def test_resuming_equals_not_stopping(name):
    straight, first, resumed = (build(name, 3) for _ in range(3))
    for step in range(6):
        expected = straight(gramian(3, step))
        if step == 3:
            resumed.load_state_dict(first.state_dict())
            first = resumed
        assert torch.equal(first(gramian(3, step)), expected)


def test_gradnorm_gives_slow_tasks_longer_gradients():
    rule = build("gradnorm", 2, alpha=1.0, lr=0.01)
    G = torch.eye(2, dtype=torch.float64)
    rule(G, losses=torch.tensor([1.0, 1.0]))
    for _ in range(400):
        weights = rule(G, losses=torch.tensor([0.9, 0.3]))
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5], dtype=torch.float64), rtol=0, atol=0.02)


def test_gradnorm_remembers_the_first_loss_of_each_task():
    rule = build("gradnorm", 2)
    G = torch.eye(1, dtype=torch.float64)
    rule(G, losses=torch.tensor([3.0]), present=torch.tensor([1]))
    assert rule.first_losses[1] == 3
    assert rule.first_losses[0].isnan()
    with pytest.raises(TaskError, match="'0' is 0 at its first step"):
        rule(torch.eye(2), losses=torch.tensor([0.0, 1.0]))
    with pytest.raises(TaskError, match="'1' is -1, but must not be negative"):
        rule(torch.eye(2), losses=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="losses must have shape"):
        rule(torch.eye(2), losses=torch.tensor([1.0]))
    assert rule(G, losses=torch.tensor([0.0]), present=torch.tensor([1])).tolist() == [1]


def test_ema_norm_keeps_the_total_length_whatever_the_scale():
    rule = build("ema_norm", 2, total_norm=3.0, decay=1.0)
    for scale in (1e-9, 1.0, 1e9):
        weights = build("ema_norm", 2, total_norm=3.0)(scale**2 * torch.diag(torch.tensor([4.0, 1.0])).double())
        assert (weights * scale * torch.tensor([2.0, 1.0])).tolist() == pytest.approx([1.5, 1.5])
    for length in (1.0, 2.0, 6.0):  # mean 3
        weights = rule(torch.diag(torch.tensor([length**2, 9.0])).double())
    assert weights.tolist() == pytest.approx([0.5, 0.5])


def test_ema_norm_shares_are_of_the_present_tasks():
    rule = build("ema_norm", 3, shares=[1.0, 5.0, 3.0])
    weights = rule(torch.eye(2, dtype=torch.float64), present=torch.tensor([0, 2]))
    assert weights.tolist() == [0.25, 0.75]
