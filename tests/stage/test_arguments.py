import copy
import math

import pytest
import torch
from torch import nn

from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": 0}, ValueError, "at least one name"),
        ({"tasks": "ab"}, TypeError, "tasks must be names"),
        ({"tasks": ("a", "a")}, ValueError, "all distinct"),
        ({"loss": "go4aling"}, ValueError, "Did you mean 'go4align'"),
        ({"gradient": "mdga"}, ValueError, "Did you mean 'mgda'"),
        ({"gradient": 3}, TypeError, "registered name or a callable"),
        ({"loss": "go4align", "loss_options": {"groups": 2}}, ValueError, "Did you mean 'num_groups'"),
        ({"loss": "go4align", "loss_options": {"num_groups": 0}}, ValueError, "at least 1"),
        ({"loss": "go4align", "loss_options": {"num_groups": "two"}}, TypeError, "must be int"),
        ({"loss": "dwa", "loss_options": {"mode": "step"}}, ValueError, "must be one of 'epoch', 'window'"),
        ({"loss": "dwa", "loss_options": {"temperature": 0.0}}, ValueError, "must be positive"),
        ({"loss": "dwa", "loss_options": {"window": 0}}, ValueError, "at least 1"),
        ({"loss": "famo", "loss_options": {"min_losses": [0.0]}}, ValueError, "one number for each"),
        ({"loss": "famo", "loss_options": {"gamma": -1.0}}, ValueError, "not be negative"),
        ({"loss": "famo", "loss_options": {"lr": 0.0}}, ValueError, "must be positive"),
        ({"loss": "go4align", "loss_options": {"step_size": -1.0}}, ValueError, "not be negative"),
        ({"loss": "rlw", "loss_options": {"scale": 0.0}}, ValueError, "must be positive"),
        ({"loss": "stl", "loss_options": {"main_task": 3}}, ValueError, r"in 0\.\.2"),
        ({"loss": torch.log, "loss_options": {"x": 1}}, ValueError, "functools.partial"),
        ({"gradient_options": {"order": "fixed"}}, ValueError, "need a gradient balancer"),
        ({"gradient": "pcgrad", "gradient_options": {"order": "sorted"}}, ValueError, "must be one of"),
        ({"source": "feature"}, ValueError, "source must be one of"),
        ({"heads": "scaled"}, ValueError, "heads must be one of"),
        ({"scale": "mean"}, ValueError, "scale must be one of"),
        ({"nan": "ignore"}, ValueError, "nan must be one of"),
    ],
)
def test_mistakes_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Balancer(**({"tasks": TASKS} | arguments))


def scalar():
    return torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({"d": scalar()}, ValueError, "Unknown task 'd'"),
        ({}, ValueError, "at least one of the tasks"),
        ({"a": 1.0}, TypeError, "must be a tensor"),
        ({"a": torch.ones(4, requires_grad=True)}, ValueError, r"Use its \.mean\(\)"),
        (torch.ones(()), ValueError, r"torch\.stack"),
        ([scalar()], TypeError, "dict by task"),
        ({"a": torch.tensor(1.0)}, ValueError, "No loss requires a gradient"),
    ],
)
def test_mistakes_in_the_losses(losses, error, message):
    with pytest.raises(error, match=message):
        Balancer(TASKS).backward(losses)


@pytest.mark.parametrize(
    ("shared", "error", "message"),
    [
        (None, TypeError, "but got nothing"),
        (nn.Linear(2, 2), TypeError, r"shared=model\.trunk\.parameters\(\)"),
        (torch.ones(2, requires_grad=True), TypeError, "iterable of parameters"),
        ([torch.ones(2, requires_grad=True)], ValueError, "A loss must reach a shared parameter"),
        ([torch.ones(2, requires_grad=True) * 2], TypeError, "give it as features"),
        (["weight"], TypeError, "must hold parameters"),
    ],
)
def test_mistakes_in_shared(shared, error, message):
    with pytest.raises(error, match=message):
        Balancer(TASKS, gradient="mgda").backward(Network().losses(), shared=shared)


def test_features_are_needed_for_source_features():
    network = Network()
    with pytest.raises(ValueError, match="features must be one tensor or several"):
        Balancer(TASKS, gradient="mgda", source="features").backward(network.losses(), shared=network.shared())


@pytest.mark.parametrize("loss", ["scaleinvls", "famo", "go4align"])
def test_a_loss_outside_the_domain_names_the_task_and_changes_nothing(loss):
    network = Network()
    losses = network.losses()
    losses["c"] = losses["c"] - 1e6
    balancer = Balancer(TASKS, loss=loss)
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(ValueError, match=f"Loss of task 'c' is -.*'{loss}'"):
        balancer.backward(losses)
    assert_same_state(balancer.state_dict(), before)


def test_famo_takes_lower_bounds():
    theta = scalar()
    balancer = Balancer(("a", "b"), loss="famo", loss_options={"min_losses": [-5.0, 0.0]})
    report = balancer.backward({"a": -3 * theta, "b": 2 * theta})
    assert report.loss_weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda L: L.sum(), "must return shape"),
        (lambda L: L.detach(), "detached"),
        (lambda L: (L - L.max()).log(), "must return finite losses"),
    ],
)
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_a_broken_loss_rule_is_told(rule, message, gradient):
    network = Network()
    with pytest.raises(ValueError, match=message):
        Balancer(TASKS, loss=rule, gradient=gradient).backward(network.losses(), shared=network.shared())


@pytest.mark.parametrize("rule", [lambda G: G, lambda G: torch.full((3,), math.nan), lambda G: 1.0])
def test_a_broken_gradient_rule_is_told(rule):
    network = Network()
    with pytest.raises(ValueError, match="must return 3 finite weights"):
        Balancer(TASKS, gradient=rule).backward(network.losses(), shared=network.shared())


def test_clipping_comes_after_the_stage():
    """The published FAMO code clips before its backward pass, so that nothing is clipped."""
    network = Network()
    Balancer(TASKS, loss="famo").backward({t: 100 * v for t, v in network.losses().items()})
    before = torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    assert before > 1e-3
    after = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    assert after.item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("loss", ["go4align", "uw", ("scaleinvls", "rlw")])
def test_a_loss_balancer_that_has_no_effect_warns(loss):
    with pytest.warns(UserWarning, match="nashmtl ignores positive loss weights"):
        Balancer(TASKS, loss=loss, gradient="nashmtl")


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("loss", ["scaleinvls", "go4align", "uw"])
def test_nash_after_any_positive_weights_is_nash(loss):
    def grads(loss):
        network = Network()
        Balancer(TASKS, loss=loss, gradient="nashmtl").backward(network.losses(), shared=network.shared())
        return network.grads()

    assert_same(grads(loss), grads("ls"), rtol=1e-4, atol=1e-5)


def test_stl_with_mgda_warns():
    with pytest.warns(UserWarning, match="will not train"):
        Balancer(TASKS, loss="stl", gradient="mgda")
