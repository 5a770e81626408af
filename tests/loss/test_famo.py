from itertools import pairwise

import pytest
import torch
from hypothesis import given

from balance import Balancer, loss_balancers
from tests.loss.derivatives import effective
from tests.strategies import losses


@given(losses(min_tasks=2, steps=2))
def test_famo_logits_and_weights(L):
    """Effective weights sum to one; without decay the gradient on the logits sums to zero, and is zero for equal losses."""
    rule = loss_balancers.build("famo", num_tasks=L.shape[1], gamma=0.0)
    assert effective(rule, L[0]).sum().item() == pytest.approx(1)
    rule.observe(L[0])
    assert rule.logits.abs().max() == 0
    effective(rule, L[0])
    rule.observe(L[1])
    assert rule.mean.sum().item() == pytest.approx(0, abs=1e-12)


def test_famo_takes_weight_from_the_task_that_fell_faster():
    rule = loss_balancers.build("famo", num_tasks=2)
    effective(rule, torch.tensor([1.0, 1.0], dtype=torch.float64))
    rule.observe(torch.tensor([0.5, 0.9]))
    assert rule.logits[0] < 0 < rule.logits[1]


def test_famo_observes_once_after_each_backward():
    rule = loss_balancers.build("famo", num_tasks=2)
    with pytest.raises(RuntimeError, match="once after each backward"):
        rule.observe(torch.ones(2))
    rule(torch.ones(2))
    rule.observe(torch.ones(2))
    with pytest.raises(RuntimeError, match="once after each backward"):
        rule.observe(torch.ones(2))


def test_famo_refuses_a_bad_observation_before_it_changes():
    rule = loss_balancers.build("famo", num_tasks=2)
    rule(torch.ones(2))
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    with pytest.raises(ValueError, match="Loss of task '1' is -1"):
        rule.observe(torch.tensor([1.0, -1.0]))
    for key, value in rule.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_famo_learns_from_the_next_batch_without_a_second_forward_pass():
    """The same logits as when the next batch's losses are observed after the step."""
    sequence = torch.tensor([[1.2, 0.5, 3.0], [1.0, 0.45, 2.7], [0.9, 0.43, 2.2]], dtype=torch.float64)
    lazy = loss_balancers.build("famo", num_tasks=3, next_batch=True)
    assert not lazy.needs_observation
    eager = loss_balancers.build("famo", num_tasks=3)
    for t, row in enumerate(sequence):
        a = effective(lazy, row)
        torch.testing.assert_close(lazy.logits, eager.logits)
        torch.testing.assert_close(a, effective(eager, row))
        if t + 1 < len(sequence):
            eager.observe(sequence[t + 1])
    assert lazy.steps.tolist() == [2, 2, 2]


def test_famo_weights_are_not_its_softmax():
    """Believed, but the weights of the losses are z / (D S)."""
    rule = loss_balancers.build("famo", num_tasks=2)
    weights = effective(rule, torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert rule.logits.softmax(dim=0).tolist() == [0.5, 0.5]
    assert weights.tolist() == pytest.approx([0.8, 0.2])


SEQUENCE = torch.tensor([[1.2, 0.5, 3.0], [1.0, 0.45, 2.7], [0.9, 0.43, 2.2], [0.95, 0.5, 2.0]], dtype=torch.float64)


def built(**options):
    return loss_balancers.build("famo", num_tasks=3, **options).double()


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_adam_that_steps_after_observe_gives_the_inner_logits(gamma):
    inner, user = built(gamma=gamma), built(optimizer="user")
    adam = torch.optim.Adam(user.parameters(), lr=0.025, weight_decay=gamma)
    for row, after in pairwise(SEQUENCE):
        torch.testing.assert_close(effective(user, row), effective(inner, row))
        inner.observe(after)
        user.observe(after)
        adam.step()
        torch.testing.assert_close(user.user_logits.values(), inner.logits, rtol=1e-12, atol=1e-14)
    assert inner.logits.abs().max() > 0.02


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("clear", ["before", "after", "zeros", "never"])
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_the_optimizer_of_the_model_uses_each_gradient_once(gradient, clear, absent):
    """The logits move one step later than with the inner optimizer, whenever gradients are cleared."""
    theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    stage = Balancer(3, loss="famo", loss_options={"optimizer": "user"}, gradient=gradient).double()
    optimizer = torch.optim.SGD([{"params": [theta], "lr": 0.0}, {"params": stage.parameters(), "lr": 0.1}])
    expected = torch.zeros(3, dtype=torch.float64)
    pending = torch.zeros(3, dtype=torch.float64)
    for step, (row, after) in enumerate(pairwise(SEQUENCE)):
        tasks = [0, 1] if absent and step == 1 else [0, 1, 2]
        if clear in ("before", "zeros"):
            optimizer.zero_grad(set_to_none=clear == "before")
        theta.grad = None
        stage.backward({str(k): row[k] * theta[k] for k in tasks}, shared=None if gradient is None else [theta])
        optimizer.step()
        expected -= 0.1 * pending
        torch.testing.assert_close(stage.loss_balancer.rule.user_logits.values(), expected)
        if clear == "after":
            optimizer.zero_grad()
        stage.observe({str(k): after[k] for k in tasks})
        z = expected[tasks].softmax(dim=0)
        delta = (row / after).log()[tasks]
        pending = torch.zeros(3, dtype=torch.float64)
        pending[tasks] = z * (delta - (z * delta).sum())
        torch.testing.assert_close(grads(stage)[tasks], pending[tasks])


def grads(stage):
    logits = stage.loss_balancer.rule.user_logits.logits
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in logits])


def observed_stage():
    theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    stage = Balancer(3, loss="famo", loss_options={"optimizer": "user"}).double()
    stage.backward(SEQUENCE[0] * theta)
    stage.observe(SEQUENCE[1])
    return theta, stage, grads(stage)


def test_micro_batches_and_a_gradient_scale_keep_the_gradient():
    theta, stage, expected = observed_stage()
    for _ in range(4):
        stage.backward(SEQUENCE[1] * theta, factor=0.25)
    torch.testing.assert_close(grads(stage), expected)
    theta, stage, expected = observed_stage()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    stage.backward(SEQUENCE[1] * theta, scaler=scaler)
    torch.testing.assert_close(grads(stage), 1024 * expected)


def test_trials_and_failed_steps_leave_the_gradient():
    theta, stage, expected = observed_stage()
    stage.weights(SEQUENCE[1] * theta)
    torch.testing.assert_close(grads(stage), expected)
    with pytest.raises(ValueError, match="must be finite"):
        stage.backward(SEQUENCE[1] * theta * torch.nan)
    with pytest.raises(ValueError, match="Loss of task '0' is -1"):
        stage.backward(-torch.ones(3, dtype=torch.float64) * theta)
    torch.testing.assert_close(grads(stage), expected)
    stage.backward(SEQUENCE[1] * theta)
    torch.testing.assert_close(grads(stage), expected)


def test_an_unused_gradient_is_in_the_checkpoint():
    theta, stage, expected = observed_stage()
    resumed = Balancer(3, loss="famo", loss_options={"optimizer": "user"}).double()
    resumed.load_state_dict(stage.state_dict())
    assert not grads(resumed).any()
    resumed.backward(SEQUENCE[1] * theta)
    torch.testing.assert_close(grads(resumed), expected)


def test_a_used_gradient_is_not_used_again():
    theta, stage, _ = observed_stage()
    torch.optim.SGD(stage.parameters(), lr=0.1).step()
    stage.backward(SEQUENCE[1] * theta)
    assert not grads(stage).any()


def test_the_next_batch_form_sets_gradients_too():
    theta = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    stage = Balancer(3, loss="famo", loss_options={"optimizer": "user", "next_batch": True}).double()
    assert not stage.needs_observation
    stage.backward(SEQUENCE[0] * theta)
    assert not grads(stage).any()
    stage.backward(SEQUENCE[1] * theta)
    _, _, expected = observed_stage()
    torch.testing.assert_close(grads(stage), expected)
