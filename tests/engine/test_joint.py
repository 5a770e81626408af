"""One backward pass for all tasks down to the features: where it is run, and that it equals one pass for each task."""

import pytest
import torch
from torch import nn

from balance import Balancer
from balance.engine import engine as engine_module
from tests.engine.definition import in_proportion, rows

TASKS = ("a", "b", "c")


class Network(nn.Module):
    """Two features, and heads of which each uses one or both, once or twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(5, 4), nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in TASKS)
        self.extra = nn.Linear(3, 2)
        self.double()
        self.x = torch.randn(6, 5, dtype=torch.float64)

    def losses(self):
        """Return the features, and the losses by name."""
        h = self.low(self.x).tanh()
        first, second = h * 1.0, self.high(h).tanh()
        twice = self.heads[0](first) * self.heads[0](first * first)
        outputs = [twice + second[:, 1:], self.heads[1](first) + self.extra(second)]
        outputs.append(self.heads[2](first.detach()) + second[:, :2])
        return [first, second], {task: y.square().mean() for task, y in zip(TASKS, outputs, strict=True)}

    @property
    def shared(self):
        """The parameters below the features."""
        return [*self.low.parameters(), *self.high.parameters()]


@pytest.fixture
def joint_passes(monkeypatch):
    """Return a list that gets an entry for each joint pass."""
    count, run = [], engine_module.joint_pass
    monkeypatch.setattr(engine_module, "joint_pass", lambda *given, **options: count.append(1) or run(*given, **options))
    return count


def step(net, features, losses, **options):
    net.zero_grad()
    balancer = Balancer(TASKS, gradient=in_proportion, heads="unweighted", **options)
    return balancer.backward(losses, shared=net.shared, features=features)


@pytest.mark.parametrize("options", [{"source": "features"}, {"engine": "batched"}], ids=["features", "batched"])
@pytest.mark.parametrize("given", [TASKS, ("a", "c")], ids=["all", "two"])
def test_a_joint_pass_keeps_the_tasks_apart(joint_passes, given, options):
    net = Network()
    features, losses = net.losses()
    losses = {task: losses[task] for task in given}
    J = rows(losses.values(), features if "source" in options else net.shared)
    heads = [*net.heads.parameters(), *net.extra.parameters()]
    plain = torch.autograd.grad(sum(losses.values()), heads, retain_graph=True, allow_unused=True)
    report = step(net, features, losses, **options)
    assert joint_passes
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-10, atol=1e-14)
    for head, gradient in zip(heads, plain, strict=True):
        if gradient is None:
            assert head.grad is None
        else:
            torch.testing.assert_close(head.grad, gradient, rtol=1e-10, atol=1e-14)
    features, losses = net.losses()
    weights = in_proportion(J @ J.T)
    total = sum(w * losses[task] for w, task in zip(weights, given, strict=True))
    for parameter, gradient in zip(net.shared, torch.autograd.grad(total, net.shared), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-13)


def test_hooks_inside_of_a_head_act_once_in_a_joint_pass(joint_passes):
    net = Network()
    net.heads[0].register_full_backward_hook(lambda module, inputs, outputs: tuple(2 * g for g in inputs))
    features, losses = net.losses()
    J = rows(losses.values(), features)
    report = step(net, features, losses, source="features")
    assert joint_passes
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-10, atol=1e-14)


def tie_heads(net, features, losses):
    losses["b"] = losses["b"] + net.heads[0].weight.square().sum()


def hook_the_feature(net, features, losses):
    features[0].register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))


def retain_the_feature(net, features, losses):
    features[0].retain_grad()


def hook_the_operation(net, features, losses):
    features[1].grad_fn.register_prehook(lambda gradients: tuple(g.clamp(-1e-2, 1e-2) for g in gradients))


def share_an_operation(net, features, losses):
    losses["b"] = losses["b"] + losses["a"] / 2


def measure_a_feature(net, features, losses):
    features.append(losses["a"])


@pytest.mark.parametrize(
    "change", [tie_heads, hook_the_feature, retain_the_feature, hook_the_operation, share_an_operation, measure_a_feature]
)
def test_a_joint_pass_is_not_run_where_tasks_meet_above_the_features(joint_passes, change):
    net = Network()
    features, losses = net.losses()
    change(net, features, losses)
    J = rows(losses.values(), features)
    report = step(net, features, losses, source="features")
    assert not joint_passes
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-10, atol=1e-14)
