"""Rules that use several batches: ``backward(further=...)``."""

import pytest
import torch
from torch import nn

from balance import Balancer

torch.manual_seed(0)
JACOBIANS = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
VALUES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


class Recorder(nn.Module):
    """A rule that keeps what it got, and returns weights that depend on it."""

    def __init__(self):
        super().__init__()
        self.got = []

    def forward(self, gramian, cross=None, present=None):
        self.got.append((gramian, cross, present))
        return gramian.diagonal() if cross is None else cross.sum(dim=1)


def batches(theta, head=None):
    values = [VALUES + J @ theta for J in JACOBIANS]
    if head is not None:
        values[0] = values[0] + head
    return values


def test_the_rule_gets_inner_products_of_the_second_and_the_third_batch():
    theta, head = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    rule = Recorder()
    losses, *further = batches(theta, head)
    report = Balancer(3, gradient=rule).backward(losses, shared=[theta], further=further)
    first, second, third = JACOBIANS
    ((gramian, cross, _),) = rule.got
    torch.testing.assert_close(gramian, first @ first.T)
    torch.testing.assert_close(cross, second @ third.T)
    torch.testing.assert_close(theta.grad, cross.sum(dim=1) @ first)
    torch.testing.assert_close(report.gramian, gramian)
    assert head.grad.tolist() == [1.0, 1.0, 1.0]


def test_gradients_are_those_of_the_weighted_losses_of_the_present_tasks():
    theta, rule = torch.zeros(4, dtype=torch.float64, requires_grad=True), Recorder()
    losses, second, third = (dict(zip("abc", batch, strict=True)) for batch in batches(theta))
    balancer = Balancer(("a", "b", "c"), loss="scaleinvls", gradient=rule)
    balancer.backward({k: losses[k] for k in "ca"}, shared=[theta], further=(second, third))
    ((_, cross, present),) = rule.got
    E = 1 / VALUES[[0, 2]]
    torch.testing.assert_close(cross, E[:, None] * (JACOBIANS[1] @ JACOBIANS[2].T)[[0, 2]][:, [0, 2]] * E)
    assert present.tolist() == [0, 2]


def test_measure_and_trials():
    a, b = (torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses, *further = [VALUES + J @ a + 2 * J @ b for J in JACOBIANS]
    rule = Recorder()
    Balancer(3, gradient=rule).backward(losses, shared=[a, b], measure=[b], further=further)
    torch.testing.assert_close(rule.got[0][1], 4 * JACOBIANS[1] @ JACOBIANS[2].T)


@pytest.mark.parametrize(
    ("options", "further", "message"),
    [
        ({"gradient": "mgda"}, 2, "use several batches"),
        ({"gradient": None}, 2, "use several batches"),
        ({"gradient": "graddrop"}, 2, "use several batches"),
        ({"gradient": Recorder()}, 1, "a pair"),
        ({"gradient": Recorder(), "source": "features"}, 2, "source"),
    ],
)
def test_what_cannot_use_further_batches_is_refused(options, further, message):
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses, *others = batches(theta)
    with pytest.raises(ValueError, match=message):
        Balancer(3, **options).backward(losses, shared=[theta], further=others[:further])
    assert theta.grad is None


def test_a_batch_without_a_task_or_with_a_nan_is_refused():
    theta, balancer = torch.zeros(4, dtype=torch.float64, requires_grad=True), Balancer(("a", "b", "c"), gradient=Recorder())
    losses, second, third = (dict(zip("abc", batch, strict=True)) for batch in batches(theta))
    with pytest.raises(ValueError, match="lacks b"):
        balancer.backward(losses, shared=[theta], further=(second, {k: third[k] for k in "ac"}))
    losses, second, third = (dict(zip("abc", batch, strict=True)) for batch in batches(theta))
    with pytest.raises(ValueError, match="further batch has"):
        balancer.backward(losses, shared=[theta], further=(second, third | {"a": third["a"] * float("nan")}))
    assert theta.grad is None
