import pytest
import torch
from hypothesis import given

from balance import loss_balancers
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
