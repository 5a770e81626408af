import copy

import pytest
import torch

import balance
from balance import Balancer, compose
from tests.stage.kinds import TASKS, layers

KINDS = {
    "plain": {},
    "reused": {"gradient": "every"},
    "nashmtl": {"gradient": "every_nashmtl"},
    "measure": {},
    "features": {"source": "features"},
    "gramian": {"memory": "gramian"},
}


def stage_of(kind, **options):
    options = {"gradient": "mgda"} | KINDS[kind] | options
    if options["gradient"] in ("every", "every_nashmtl"):
        options["gradient"] = compose.every(5, "mgda" if options["gradient"] == "every" else "nashmtl", 3)
    return Balancer(TASKS, **options)


def arguments_of(kind, model, z):
    extra = {"measure": {"measure": model.high.parameters()}, "features": {"features": z}}.get(kind, {})
    return {"shared": model.shared()} | extra


def state_of(stage):
    return copy.deepcopy(stage.state_dict())


def assert_same_state(stage, before):
    now = stage.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.filterwarnings("ignore:nashmtl ignores")
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_never_reaches_grad(kind, factor):
    model = layers()
    stage = stage_of(kind, loss="go4align")
    for step in range(2):
        z, losses = model.losses(factor if step else None)
        if not step:
            stage.backward(losses, **arguments_of(kind, model, z))
            grads, state = [p.grad.clone() for p in model.parameters()], state_of(stage)
            continue
        with pytest.raises(ValueError, match="Gradients must be finite"):
            stage.backward(losses, **arguments_of(kind, model, z))
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert_same_state(stage, state)
    z, losses = model.losses()
    stage.backward(losses, **arguments_of(kind, model, z))  # the next step is an ordinary one


@pytest.mark.filterwarnings("ignore:nashmtl ignores")
@pytest.mark.parametrize("loss", ["famo", "go4align", "uw"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_no_rule_learns_from_a_step_that_the_scaler_skips(kind, loss):
    model = layers()
    stage = Balancer(TASKS, loss=loss) if kind == "none" else stage_of(kind, loss=loss)
    optimizer = torch.optim.SGD([*model.parameters(), *stage.parameters()], 0.01)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        optimizer.zero_grad()
        z, losses = model.losses(float("inf") if step == 1 else None)
        before, weight = state_of(stage), model.low.weight.clone()
        stage.backward(losses, scaler=scaler, **arguments_of(kind, model, z))
        scaler.step(optimizer)
        scaler.update()
        stage.observe({task: 0.5 * value.detach() for task, value in losses.items()})
        assert torch.equal(weight, model.low.weight) == (step == 1)
        if step == 1:
            assert_same_state(stage, before)


def failing(gramian):
    raise ValueError("no solution")


@pytest.mark.parametrize("loss", balance.loss_balancers.names())
def test_a_step_that_fails_moves_no_rule(loss):
    options = {"dwa": {"mode": "window"}, "famo": {"next_batch": True}}.get(loss, {})
    stage = Balancer(2, loss=loss, gradient=failing, loss_options=options)
    theta = torch.ones(3, requires_grad=True)
    before = state_of(stage)
    for _ in range(2):
        with pytest.raises(ValueError, match="no solution"):
            stage.backward({"0": theta.square().sum(), "1": (theta - 3).square().sum()}, shared=[theta])
    assert_same_state(stage, before)
    assert theta.grad is None
    assert all(p.grad is None for p in stage.parameters())


def test_a_failed_step_does_not_move_the_gradient_rule_either():
    stage = Balancer(TASKS, gradient="pcgrad", loss=lambda losses: losses * torch.tensor(float("inf")))
    before = state_of(stage)
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="The loss balancer must return finite losses"):
        stage.backward(theta * 1.0, shared=[theta])
    assert_same_state(stage, before)
