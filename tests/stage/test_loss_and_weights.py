"""balancer.loss(...), a scalar whose backward pass is the step; and balancer.weights(...), which changes nothing."""

import pytest
import torch

from balance import Balancer
from balance.stage.deferred import leaves_besides_steps
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state

PAIRS = ({}, {"loss": "uw"}, {"gradient": "nashmtl"}, {"gradient": "pcgrad", "loss": "go4align"}, {"gradient": "graddrop"})


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("options", PAIRS, ids=str)
def test_the_backward_pass_of_the_scalar_is_the_step(options, factor):
    network, balancer = Network(), Balancer(TASKS, **options)
    losses = network.losses()
    scalar = balancer.loss(losses, shared=network.shared())
    torch.testing.assert_close(scalar, sum(losses.values()).detach())
    assert balancer.report is None
    (factor * scalar).backward()
    other, twin = Network(), Balancer(TASKS, **options)
    report = twin.backward(other.losses(), shared=other.shared(), factor=factor)
    assert_same(network.grads(), other.grads(), rtol=0, atol=0)
    assert_same_state(dict(balancer.state_dict()), dict(twin.state_dict()))
    torch.testing.assert_close(balancer.report.loss_weights, report.loss_weights, rtol=0, atol=0)


def test_losses_of_zero_are_no_special_case():
    w = torch.zeros(2, requires_grad=True)
    balancer = Balancer(2, gradient="mgda")
    (0.5 * balancer.loss({"0": w[0].square(), "1": w[1].square() + 0 * w[0]}, shared=[w])).backward()
    assert torch.equal(w.grad, torch.zeros(2))


@pytest.mark.parametrize("options", [{}, {"gradient": "nashmtl"}], ids=str)
def test_a_gradient_scaler_multiplies_the_scalar(options):
    grads = []
    for deferred in (True, False):
        network, balancer = Network(), Balancer(TASKS, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        if deferred:
            scaler.scale(0.5 * balancer.loss(network.losses(), shared=network.shared(), scaler=scaler)).backward()
        else:
            balancer.backward(network.losses(), shared=network.shared(), scaler=scaler, factor=0.5)
        grads.append(network.grads())
    assert_same(*grads, rtol=1e-6, atol=0)


def test_an_overflow_is_left_to_the_declared_scaler_and_otherwise_an_error():
    network, balancer = Network(), Balancer(TASKS, loss="famo", gradient="mgda")
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    losses = network.losses()
    losses["a"] = losses["a"] * torch.inf
    with pytest.raises(ValueError, match="Losses must be finite"):
        balancer.loss(losses, shared=network.shared()).backward()
    assert all(p.grad is None for p in network.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = network.losses()
    losses["a"] = losses["a"] * torch.inf
    scaler.scale(balancer.loss(losses, shared=network.shared(), scaler=scaler)).backward()
    assert any(p.grad.isnan().any() for p in network.parameters())
    assert_same_state(dict(balancer.state_dict()), before)


def test_a_second_backward_pass_is_refused():
    network, balancer = Network(), Balancer(TASKS)
    scalar = balancer.loss(network.losses())
    scalar.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have been balanced already"):
        scalar.backward()


def test_a_scalar_inside_of_collect():
    network, balancer = Network(), Balancer(TASKS, gradient="mgda")
    with balancer.collect():
        for task in TASKS:
            balancer.loss({task: network.losses()[task]}, shared=network.shared()).backward()
    other = Network()
    Balancer(TASKS, gradient="mgda").backward(other.losses(), shared=other.shared())
    assert_same(network.grads(), other.grads(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [*PAIRS, {"gradient": "mgda", "source": "features"}, {"gradient": "imtl", "memory": "gramian"}, {"loss": "rlw"}],
    ids=str,
)
def test_weights_change_nothing_and_are_those_of_the_next_step(options):
    network, balancer = Network(), Balancer(TASKS, **options)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    z = network.trunk(network.x)
    losses = network.losses(z)
    given = {"shared": list(network.shared()), "features": z if "source" in options else None}
    first, second = (balancer.weights(losses, **given) for _ in range(2))
    assert all(p.grad is None for p in (*network.parameters(), *balancer.parameters()))
    assert_same_state(dict(balancer.state_dict()), before)
    assert balancer.report is None
    report = balancer.backward(losses, **given)  # the graph is still there
    for name in ("loss_weights", "gradient_weights", "total_weights", "gramian"):
        mine, again, theirs = getattr(first, name), getattr(second, name), getattr(report, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, again, rtol=0, atol=0)
            torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"loss": "uw"}, {"gradient": "cagrad", "loss": "go4align"}, {"gradient": "mgda"}], ids=str)
def test_total_weights_give_the_shared_direction(options):
    network, balancer = Network(), Balancer(TASKS, **options)
    losses = network.losses()
    weights = balancer.weights(losses, shared=network.shared()).total_weights
    (weights * torch.stack([*losses.values()])).sum().backward()
    other, twin = Network(), Balancer(TASKS, **options)
    twin.backward(other.losses(), shared=other.shared())
    trunk = {name: g for name, g in network.grads().items() if name.startswith("trunk")}
    assert_same(trunk, {name: g for name, g in other.grads().items() if name.startswith("trunk")}, rtol=1e-4, atol=1e-5)


def test_weights_refuse_losses_that_are_not_finite():
    network, balancer = Network(), Balancer(TASKS, gradient="mgda")
    losses = network.losses()
    losses["b"] = losses["b"] * torch.nan
    with pytest.raises(ValueError, match="Losses must be finite"):
        balancer.weights(losses, shared=network.shared())


def test_the_scaler_of_the_stage_is_the_default():
    grads = []
    for by_argument in (True, False):
        network, balancer = Network(), Balancer(TASKS, gradient="nashmtl")
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        balancer.scaler = None if by_argument else scaler
        given = {"scaler": scaler} if by_argument else {}
        scaler.scale(balancer.loss(network.losses(), shared=network.shared(), **given)).backward()
        balancer.backward(network.losses(), shared=network.shared(), **given)
        grads.append(network.grads())
    assert_same(*grads, rtol=0, atol=0)
    assert "scaler" not in balancer.state_dict()


def test_a_training_loop_can_refuse_direct_calls_of_backward():
    network, balancer = Network(), Balancer(TASKS)
    balancer.backward_refusal = "Return balancer.loss(...) instead."
    with pytest.raises(RuntimeError, match=r"Return balancer\.loss"):
        balancer.backward(network.losses(), shared=network.shared())
    balancer.loss(network.losses(), shared=network.shared()).backward()
    assert network.grads()


def test_leaves_that_get_a_gradient_besides_the_step():
    network, balancer = Network(), Balancer(TASKS)
    loss, weight = balancer.loss(network.losses(), shared=network.shared()), next(network.parameters())
    assert leaves_besides_steps(loss / 4) == []
    assert [id(leaf) for leaf in leaves_besides_steps(loss + weight.square().sum())] == [id(weight)]
    assert leaves_besides_steps(sum(network.losses().values())) is None
    assert leaves_besides_steps(torch.zeros(())) is None


def test_a_refusal_of_backward_leaves_collections_alone():
    network, balancer = Network(), Balancer(TASKS)
    balancer.backward_refusal = "Return balancer.loss(...) instead."
    with balancer.collect():
        balancer.backward(network.losses(), shared=network.shared())
    assert network.grads()
