import copy
import math

import pytest
import torch
from torch import nn

import balance
from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state

# Absent tasks


@pytest.mark.filterwarnings("ignore:mgda gives all weight")
@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
@pytest.mark.parametrize("loss", [name for name in balance.loss_balancers.names() if name not in ("stl", "igbv2")])
def test_absent_task_is_the_smaller_problem(loss, gradient):
    def train(tasks, given, nan):
        network = Network(tasks=TASKS)
        balancer = Balancer(tasks, loss=loss, gradient=gradient, nan="absent")
        for _ in range(3):
            losses = {t: v for t, v in network.losses().items() if t in given or nan}
            if nan:
                losses["b"] = losses["b"] * math.nan
            report = balancer.backward(losses, shared=network.shared())
            if balancer.needs_observation:
                with torch.no_grad():
                    balancer.observe({t: 0.9 * v for t, v in network.losses().items() if t in given})
            balancer.end_epoch()
        return network.grads(), report

    smaller, _ = train(("a", "c"), ("a", "c"), nan=False)
    absent, report = train(TASKS, ("a", "c"), nan=False)
    assert_same(absent, smaller, rtol=1e-6, atol=1e-9)
    assert report.tasks == ("a", "c")
    not_a_number, report = train(TASKS, ("a", "c"), nan=True)
    assert_same(not_a_number, smaller, rtol=1e-6, atol=1e-9)
    assert set(report.as_metrics()) >= {"loss/a", "loss/c", "weight/a"}
    assert "loss/b" not in report.as_metrics()


def test_absent_tasks_need_a_dict():
    with pytest.raises(ValueError, match=r"Use \{name: loss\}"):
        Balancer(2, nan="absent").backward(torch.tensor([1.0, math.nan], requires_grad=True))


def test_an_optimizer_with_momentum_leaves_the_parameters_of_an_absent_task_alone():
    network = Network()
    balancer = Balancer(TASKS, loss="uw")
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for present in (TASKS, ("a", "c"), ("a", "c")):
        optimizer.zero_grad()
        before = [s.item() for s in balancer.loss_balancer.rule.log_variances]
        balancer.backward({t: v for t, v in network.losses().items() if t in present})
        optimizer.step()
        after = [s.item() for s in balancer.loss_balancer.rule.log_variances]
        assert [a != b for a, b in zip(before, after, strict=True)] == [t in present for t in TASKS]


def test_absent_task_keeps_its_state():
    network = Network()
    for name in ("famo", "uw", "go4align"):
        balancer = Balancer(TASKS, loss=name)
        balancer.backward(network.losses())
        if balancer.needs_observation:
            balancer.observe({t: 0.9 * v.detach() for t, v in network.losses().items()})
        before = copy.deepcopy(balancer.loss_balancer.rule.state_dict())
        balancer.backward({t: v for t, v in network.losses().items() if t != "b"})
        if balancer.needs_observation:
            balancer.observe({t: 0.5 * v.detach() for t, v in network.losses().items() if t != "b"})
        changed = name == "uw"  # one parameter for each task
        for key, value in balancer.loss_balancer.rule.state_dict().items() if name != "uw" else ():
            torch.testing.assert_close(value[1], before[key][1], equal_nan=True)
            changed |= not torch.equal(value.nan_to_num(), before[key].nan_to_num())
        assert changed


def test_a_rule_with_state_by_task_must_know_who_is_present():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, losses):
            return self.weights * losses

    network = Network()
    balancer = Balancer(TASKS, loss=Fixed())
    balancer.backward(network.losses())
    with pytest.raises(ValueError, match="keyword present=None"):
        balancer.backward({"a": network.losses()["a"]})


# Not finite


@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize("loss", balance.loss_balancers.names())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:mgda gives all weight")
def test_a_loss_that_is_not_finite_is_an_error_that_changes_nothing(loss, gradient, bad):
    network = Network()
    balancer = Balancer(TASKS, loss=loss, gradient=gradient)
    before = copy.deepcopy(balancer.state_dict())
    losses = network.losses()
    losses["b"] = losses["b"] * bad
    with pytest.raises(ValueError, match=r"finite.*'b'"):
        balancer.backward(losses, shared=network.shared())
    assert all(p.grad is None for p in network.parameters())
    assert_same_state(balancer.state_dict(), before)


@pytest.mark.parametrize("loss", ["ls", "go4align", "famo", "rlw", "dwa"])
@pytest.mark.parametrize("where", ["shared", "head"])
def test_a_gradient_that_is_not_finite_names_the_task_and_changes_nothing(where, loss):
    theta, head = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    bad = theta if where == "shared" else head
    losses = {"a": theta.sum() + 1, "b": theta.sum() + bad.abs().sqrt().sum() + 1}
    options = {"mode": "window"} if loss == "dwa" else {}
    balancer = Balancer(("a", "b"), loss=loss, loss_options=options, gradient="mgda")
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(ValueError, match="gradients of b are not"):
        balancer.backward(losses, shared=[theta])
    assert theta.grad is None
    assert head.grad is None
    assert_same_state(balancer.state_dict(), before)


@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_grad_scaler(gradient, source):
    """Scaled and unscaled again, the step is the same as without a scaler."""

    def train(scaler):
        network = Network()
        balancer = Balancer(TASKS, loss="uw", gradient=gradient, source=source)
        optimizer = torch.optim.SGD([*network.parameters(), *balancer.parameters()], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            z = network.trunk(network.x)
            report = balancer.backward(network.losses(z), shared=network.shared(), features=z, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        return report, {name: p.detach() for name, p in [*network.named_parameters(), *balancer.named_parameters()]}

    off = train(torch.amp.GradScaler("cpu", enabled=False))
    on = train(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_same(on[1], off[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(on[0].loss_weights, off[0].loss_weights, rtol=1e-4, atol=1e-6)
    if gradient:
        torch.testing.assert_close(on[0].gramian, off[0].gramian, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize("loss", ["famo", "go4align", "uw"])
def test_grad_scaler_skips_what_is_not_finite(loss, gradient, kind):
    theta, head = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    balancer = Balancer(("a", "b"), loss=loss, gradient=gradient)
    state = copy.deepcopy(balancer.loss_balancer.rule.state_dict())
    optimizer = torch.optim.SGD([theta, head, *balancer.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bad = theta.sum() * math.inf if kind == "loss" else (theta - 1).abs().sqrt().sum() + head.sum()
    losses = {"a": theta.sum() + head.sum(), "b": bad}
    balancer.backward(losses, shared=[theta], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert theta.tolist() == [1, 1]
    balancer.observe({"a": torch.tensor(math.nan), "b": torch.tensor(1.0)})  # nothing to learn from a skipped step
    if loss == "famo" and gradient is None and kind == "gradient":  # finite losses were seen, but nothing was learned
        assert balancer.loss_balancer.rule.logits.tolist() == [0, 0]
    elif gradient or kind == "loss":
        assert_same_state(balancer.loss_balancer.rule.state_dict(), state)
