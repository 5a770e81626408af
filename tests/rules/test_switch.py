"""Rules that take turns: `compose.switch` and `compose.warmup`."""

import copy
import warnings

import pytest
import torch

from balance import Balancer, compose

J = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 1.0, 3.0], [0.5, -2.0, 1.0]], dtype=torch.float64)


def step(balancer, losses=(1.0, 2.0, 4.0), heads=False):
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    values = torch.tensor(losses, dtype=torch.float64) + J @ theta + h
    balancer.backward(values, shared=[theta])
    return h.grad if heads else theta.grad


def test_gradient_balancers_take_turns():
    balancer = Balancer(3, gradient=compose.switch({0: "ls", 2: ("nashmtl", {"max_norm": None}), 3: "mgda"}))
    grads = [step(balancer) for _ in range(5)]
    for expected, grad in zip((None, None, "nashmtl", "mgda", "mgda"), grads, strict=True):
        options = {"max_norm": None} if expected == "nashmtl" else {}
        torch.testing.assert_close(grad, step(Balancer(3, gradient=expected, gradient_options=options)))


def test_heads_are_treated_as_by_the_rule_of_the_step():
    balancer = Balancer(3, gradient=compose.switch({0: "pcgrad", 1: "mgda"}))
    assert step(balancer, heads=True).tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(step(balancer, heads=True), step(Balancer(3, gradient="mgda"), heads=True))
    assert step(Balancer(3, gradient=compose.switch({0: "mgda"}), heads="unweighted"), heads=True).tolist() == [1.0] * 3


def test_loss_balancers_take_turns_and_begin_as_new_rules():
    balancer = Balancer(3, loss=compose.switch({0: "ls", 1: "famo"}))
    step(balancer)
    assert not balancer.needs_observation
    balancer.observe(torch.ones(3))  # nobody asks for it
    famo = Balancer(3, loss="famo")
    for k in range(3):
        losses = [1.0 + k, 2.0, 4.0]
        torch.testing.assert_close(step(balancer, losses), step(famo, losses))
        assert balancer.needs_observation
        for stage in (balancer, famo):
            stage.observe(torch.tensor([1.0, 1.5, 4.0]))


def test_epochs_reach_the_rule_of_the_last_step():
    balancer, dwa = Balancer(3, loss=compose.warmup("dwa", 1)), Balancer(3, loss="dwa")
    step(balancer)
    balancer.end_epoch()
    for losses in ([1.0, 2.0, 4.0], [0.5, 2.0, 4.0], [0.4, 1.0, 4.0]):
        torch.testing.assert_close(step(balancer, losses), step(dwa, losses))
        for stage in (balancer, dwa):
            stage.end_epoch()


def test_warmup_is_a_switch_from_equal_weights():
    balancer = Balancer(3, gradient=compose.warmup("mgda", 2))
    grads = [step(balancer) for _ in range(3)]
    torch.testing.assert_close(grads[:2], [J.sum(dim=0)] * 2)
    torch.testing.assert_close(grads[2], step(Balancer(3, gradient="mgda")))
    torch.testing.assert_close(step(Balancer(3, gradient=compose.warmup("mgda", 0))), grads[2])


@pytest.mark.parametrize("at", range(5))
def test_a_resumed_run_continues_bit_for_bit(at):
    def new():
        return Balancer(3, gradient=compose.switch({0: "ls", 2: compose.every(2, "mgda", 3), 4: "pcgrad"}), seed=3)

    whole, first = new(), new()
    expected = [step(whole, [1.0 + t, 2.0, 4.0]) for t in range(7)]
    for t in range(at):
        step(first, [1.0 + t, 2.0, 4.0])
    resumed = new()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for t in range(at, 7):
        assert torch.equal(step(resumed, [1.0 + t, 2.0, 4.0]), expected[t])


def test_a_failed_step_and_a_trial_do_not_count():
    balancer = Balancer(3, gradient=compose.warmup("mgda", 1))
    with pytest.raises(ValueError, match="finite"):
        step(balancer, [float("nan"), 1.0, 1.0])
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    balancer.weights(torch.ones(3, dtype=torch.float64) + J @ theta, shared=[theta])
    assert int(balancer.gradient_balancer.rule.steps) == 0
    torch.testing.assert_close(step(balancer), J.sum(dim=0))


def test_random_rules_draw_the_numbers_of_the_stage():
    switched, alone = Balancer(3, gradient=compose.switch({0: "pcgrad"}), seed=5), Balancer(3, gradient="pcgrad", seed=5)
    for _ in range(5):
        assert torch.equal(step(switched), step(alone))


def test_priorities_survive_a_switch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer = Balancer(3, gradient=compose.switch({0: "ls", 1: "nashmtl"}), weights={"1": 4.0})
    for expected in (None, "nashmtl"):
        torch.testing.assert_close(step(balancer), step(Balancer(3, gradient=expected, weights={"1": 4.0})))


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({}, ValueError, "begin at step 0"),
        ({1: "mgda"}, ValueError, "begin at step 0"),
        ({-1: "ls", 0: "mgda"}, ValueError, "begin at step 0"),
        ({0.5: "mgda", 0: "ls"}, TypeError, "numbers of steps"),
    ],
)
def test_wrong_numbers_of_steps_are_refused(rules, error, message):
    with pytest.raises(error, match=message):
        compose.switch(rules)


def test_wrong_rules_are_refused_when_the_stage_is_built():
    with pytest.raises(ValueError, match="Did you mean 'mgda'"):
        Balancer(3, gradient=compose.switch({0: "mgad"}))
    with pytest.raises(ValueError, match="sees the Jacobian"):
        Balancer(3, gradient=compose.switch({0: "ls", 5: "graddrop"}))
    with pytest.raises(ValueError, match="must not be negative"):
        compose.warmup("mgda", -1)
    with pytest.raises(TypeError, match="no rule yet"):
        compose.switch({0: "mgda"})(torch.eye(3))
    assert repr(compose.switch({0: "ls", 5: ("cagrad", {"c": 0.9})})) == "switch({0: ls, 5: cagrad(c=0.9)})"
