import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import balance
from balance import Balancer
from balance.rules.protocol import takes
from tests.stage.three_tasks import TASKS, Network, assert_same, reference
from tests.strategies import SEEDS

# Plain backward


@given(seed=SEEDS, as_tensor=st.booleans())
def test_ls_alone_is_the_ordinary_backward_bit_for_bit(seed, as_tensor):
    network = Network(seed)
    twin = copy.deepcopy(network)
    torch.stack(list(twin.losses().values())).sum().backward()
    losses = network.losses()
    report = Balancer(TASKS).backward(torch.stack(list(losses.values())) if as_tensor else losses)
    assert_same(network.grads(), twin.grads(), rtol=0, atol=0)
    assert report.gramian is None
    assert report.loss_weights.tolist() == [1, 1, 1]


def test_without_gradient_balancer_autograd_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a second backward pass"))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: calls.append(1) or backward(self, *a, **k))
    Balancer(TASKS, loss="uw").backward(Network().losses())
    assert calls == [1]


# Composition


LOSSES, HEADS = ("ls", "scaleinvls", "go4align", "uw"), (None, "weighted", "unweighted")
ON_GRAMIANS = [name for name in balance.gradient_balancers.names() if balance.gradient_balancers.sees(name) == "gramian"]


# Every choice for three rules; for the others each choice once, and the rest in the slow tests
FAST = {
    *itertools.product(LOSSES, ("mgda", "pcgrad", "imtl"), HEADS, (False, True)),
    *((LOSSES[i % 4], name, HEADS[i % 3], i % 2 == 0) for i, name in enumerate(ON_GRAMIANS)),
}
PAIRINGS = [
    pytest.param(*pairing, marks=[] if pairing in FAST else pytest.mark.slow)
    for pairing in itertools.product(LOSSES, ON_GRAMIANS, HEADS, (False, True))
]


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize(("loss", "gradient", "heads", "as_tensor"), PAIRINGS)
def test_gradients_are_those_of_the_weighted_losses(loss, gradient, heads, as_tensor):
    network = Network()
    losses = network.losses()
    balancer = Balancer(TASKS, loss=loss, gradient=gradient, heads=heads)
    rule = copy.deepcopy(balancer.gradient_balancer.rule)  # with the state of its generator
    report = balancer.backward(torch.stack(list(losses.values())) if as_tensor else losses, shared=network.shared())
    twin = copy.deepcopy(network)
    rows = [torch.autograd.grad(loss, list(twin.trunk.parameters()), retain_graph=True) for loss in twin.losses().values()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double() * report.loss_weights.double()[:, None]
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-5, atol=1e-12)
    keywords = {"losses": torch.stack(list(losses.values())).detach().double()} if takes(rule, "losses") else {}
    weights = rule(report.gramian, **keywords).float()
    torch.testing.assert_close(report.gradient_weights, weights)
    official = balance.gradient_balancers.heads(gradient)
    head_weights = weights if (heads or official) == "weighted" else torch.ones(3)
    expected = reference(network, weights * report.loss_weights, head_weights * report.loss_weights)
    assert_same(network.grads(), expected, rtol=1e-4, atol=1e-4)


def test_a_loss_rule_that_mixes_tasks_is_exact():
    """A custom rule whose outputs depend on several losses: autograd of the weighted losses is the reference."""
    mix = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]])
    network = Network()
    report = Balancer(TASKS, loss=lambda L: mix @ L.log(), gradient=lambda G: torch.tensor([1.0, 2.0, 3.0])).backward(
        network.losses(), shared=network.shared()
    )
    twin = Network()
    weighted = mix @ torch.stack(list(twin.losses().values())).log()
    rows = [torch.autograd.grad(w, list(twin.trunk.parameters()), retain_graph=True) for w in weighted]
    for p, *gs in zip(network.trunk.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, gs[0] + 2 * gs[1] + 3 * gs[2], rtol=1e-4, atol=1e-6)
    heads = torch.autograd.grad(weighted.sum(), list(twin.heads.parameters()))
    for p, g in zip(network.heads.parameters(), heads, strict=True):
        torch.testing.assert_close(p.grad, g)
    torch.testing.assert_close(report.weighted_losses, weighted.detach())


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_parameters_of_the_balancer_get_the_plain_sum(gradient):
    network = Network()
    balancer = Balancer(TASKS, loss="uw", gradient=gradient)
    losses = network.losses()
    balancer.backward(losses, shared=network.shared())
    plain = 0.5 * (1 - torch.stack(list(losses.values())).detach())
    torch.testing.assert_close(torch.stack([s.grad for s in balancer.loss_balancer.rule.log_variances]), plain)


@pytest.mark.parametrize(("scale", "gradient"), [("sum", "mgda"), ("norm", "mgda"), ("sum", "pcgrad"), ("norm", "pcgrad")])
def test_scale(scale, gradient):
    network = Network()
    report = Balancer(TASKS, gradient=gradient, scale=scale).backward(network.losses(), shared=network.shared())
    paper = balance.gradient_balancers.build(gradient)(report.gramian)
    weights = report.gradient_weights.double()
    torch.testing.assert_close(weights / weights.norm(), paper / paper.norm(), rtol=1e-6, atol=1e-7)
    if scale == "sum":
        assert weights.sum().item() == pytest.approx(3, rel=1e-6)
    else:
        direction = torch.cat([p.grad.flatten() for p in network.shared()]).double()
        assert direction.norm().item() == pytest.approx(report.gramian.sum().sqrt().item(), rel=1e-5)


def test_norm_scale_leaves_a_stationary_point_alone():
    theta = torch.zeros(2, requires_grad=True)
    losses = {"a": theta[0] + 0 * theta[1], "b": -theta[0] + 0 * theta[1]}
    Balancer(("a", "b"), gradient="mgda", scale="norm").backward(losses, shared=[theta])
    assert theta.grad.abs().max() < 1e-6


# Rules of others


def test_losses_keyword_gets_the_raw_losses():
    seen = {}

    def rule(gramian, *, losses):
        seen["losses"] = losses
        return torch.ones(len(gramian))

    network = Network()
    losses = network.losses()
    Balancer(TASKS, loss="scaleinvls", gradient=rule).backward(losses, shared=network.shared())
    torch.testing.assert_close(seen["losses"], torch.stack(list(losses.values())).detach().double())


def test_a_rule_that_sees_the_jacobian(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))

    @balance.gradient_balancers.register("sign_sum", sees="jacobian")
    def sign_sum(jacobian):
        return jacobian.sign().sum(dim=0)

    network = Network()
    report = Balancer(TASKS, gradient="sign_sum").backward(network.losses(), shared=network.shared())
    twin = Network()
    rows = [torch.autograd.grad(loss, list(twin.trunk.parameters()), retain_graph=True) for loss in twin.losses().values()]
    for p, *gs in zip(network.trunk.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, sum(g.sign() for g in gs))
    assert report.gradient_weights is None
    assert "gradient_weight/a" not in report.as_metrics()
    with pytest.raises(ValueError, match="has no weights"):
        Balancer(TASKS, gradient="sign_sum", scale="sum")


# Report


def test_report():
    theta = torch.zeros(2, requires_grad=True)
    losses = {"a": theta[0] + 1, "b": -theta[0] + theta[1] + 2}
    report = Balancer(("a", "b"), gradient="mgda").backward(losses, shared=[theta])
    assert report.conflicts == 1
    assert report.gramian.tolist() == [[1, -1], [-1, 2]]
    metrics = report.as_metrics()
    assert metrics["cosine/a__b"] == pytest.approx(-(0.5**0.5))
    assert {"loss/a": 1.0, "loss/b": 2.0, "weight/a": 1.0, "weight/b": 1.0, "conflicts": 1.0}.items() <= metrics.items()
    assert metrics["gradient_weight/a"] == pytest.approx(0.6)
    assert not any(t.requires_grad for t in (report.losses, report.weighted_losses, report.loss_weights))
    with pytest.raises(AttributeError):
        report.losses = None
