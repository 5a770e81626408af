import math

import numpy as np
import pytest
import torch

from balance import Balancer, loss_balancers
from balance.loss.coba import coba_weights, line_slopes
from tests.loss.derivatives import effective


def observe(rule, rows):
    for row in rows:
        rule.observe_validation(torch.tensor(row, dtype=torch.float64))
    return effective(rule, torch.ones(len(rule.weights), dtype=torch.float64))


def test_line_slopes():
    columns = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns[[2, 5], 1] = torch.nan
    columns[1:, 2] = torch.nan
    columns[:, 3] = 0.1
    slopes = line_slopes(columns)
    for k in (0, 1):
        points = ~columns[:, k].isnan()
        expected = np.polyfit(np.arange(9)[points], columns[points, k], 1)[0]
        assert slopes[k].item() == pytest.approx(expected)
    assert slopes[2].isnan()
    assert slopes[3] == 0


def test_weights_are_equal_until_the_warm_up_has_ended():
    rule = loss_balancers.build("coba", num_tasks=2, warmup=4)
    for step in range(6):
        weights = observe(rule, [[1.0 - 0.1 * step, 1.0 - 0.01 * step]])
        assert (weights[0] == weights[1]) == (step < 4)


def test_a_slow_task_gets_weight_and_a_diverging_task_loses_it():
    slow = loss_balancers.build("coba", num_tasks=2, warmup=3)
    weights = observe(slow, [[0.9**t, 0.99**t] for t in range(10)])
    assert weights[1] > weights[0]
    diverging = loss_balancers.build("coba", num_tasks=2, warmup=3, history=5)
    weights = observe(diverging, [[0.9**t, 0.9**t if t < 10 else 0.9**10 * 1.2 ** (t - 10)] for t in range(25)])
    assert weights[0] > weights[1]


def test_weights_have_a_floor():
    # by hand: a share of nearly 0 becomes 0.1 / K, and a share of nearly 1 becomes 0.9 + 0.1 / K
    slopes = torch.tensor([[-1.0, *[-1e-9] * 29]] * 2, dtype=torch.float64).T.reshape(30, 2).T
    weights = coba_weights(slopes, torch.tensor([-1.0, -1.0]), 5.0)
    assert weights.sum().item() == pytest.approx(1)
    assert weights.min().item() >= 0.1 / 30


def test_constant_losses_give_equal_weights():
    for value in (0.1, 1.0, 1 / 3):
        rule = loss_balancers.build("coba", num_tasks=3, warmup=2)
        assert observe(rule, [[value, 2 * value, 5.0]] * 6).tolist() == [pytest.approx(1 / 3)] * 3


def test_weights_do_not_depend_on_the_units():
    rows = [[0.9**t, 0.95**t, 1 + 0.1 * math.sin(t)] for t in range(12)]
    a, b = (loss_balancers.build("coba", num_tasks=3, warmup=3, history=6) for _ in range(2))
    torch.testing.assert_close(observe(a, rows), observe(b, [[7 * x, 0.1 * y, 30 * z] for x, y, z in rows]))


def test_weights_of_present_tasks_sum_to_one():
    rule = loss_balancers.build("coba", num_tasks=3, warmup=2)
    whole = observe(rule, [[0.9**t, 0.95**t, 0.99**t] for t in range(6)])
    weights = rule(torch.ones(2, dtype=torch.float64), present=torch.tensor([0, 2]))
    torch.testing.assert_close(weights, whole[[0, 2]] / whole[[0, 2]].sum())


def test_a_task_without_validation_losses_has_the_mean_weight():
    rule = loss_balancers.build("coba", num_tasks=3, warmup=2)
    for t in range(6):
        rule.observe_validation(torch.tensor([0.9**t, 0.99**t], dtype=torch.float64), present=torch.tensor([0, 2]))
    weights = effective(rule, torch.ones(3, dtype=torch.float64))
    assert weights[1].item() == pytest.approx((weights[0] + weights[2]).item() / 2)
    assert weights.sum().item() == pytest.approx(1)


def test_a_task_may_be_absent_from_some_batches():
    rule = loss_balancers.build("coba", num_tasks=2, warmup=2, history=8)
    for t in range(12):
        present = torch.tensor([0]) if t % 3 == 2 else None
        losses = torch.tensor([0.9**t, 0.97**t], dtype=torch.float64)
        rule.observe_validation(losses if present is None else losses[:1], present)
    points = np.array([t for t in range(4, 12) if t % 3 != 2])  # the last 8 observations
    expected = np.polyfit(points, 0.97**points, 1)[0]
    assert rule.slopes[-1, 1].item() == pytest.approx(expected)


def test_the_divergence_factor_remembers_more_than_the_history():
    rule = loss_balancers.build("coba", num_tasks=2, warmup=2, history=3)
    observe(rule, [[0.9**t, 0.99**t] for t in range(30)])
    assert rule.get_extra_state().shape == (28,)
    other = loss_balancers.build("coba", num_tasks=2, warmup=2, history=3)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(observe(other, [[0.5, 0.9]]), observe(rule, [[0.5, 0.9]]))
    assert other.get_extra_state().shape == (29,)


TASKS = ("a", "b")


def test_the_stage_passes_validation_losses_on():
    stage = Balancer(TASKS, loss="coba", loss_options={"warmup": 2})
    assert stage.needs_validation
    rule = stage.loss_balancer.rule
    for t in range(4):
        stage.observe_validation({"a": torch.tensor(0.9**t), "b": torch.tensor(0.99**t)})
    stage.observe_validation({"b": torch.tensor(0.5)})
    assert rule.observations == 4
    assert rule.ratios[-1].isnan().tolist() == [True, False]
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    report = stage.backward({"a": theta[0] * 1, "b": theta[1] * 1})
    assert report.loss_weights.sum().item() == pytest.approx(1)
    assert report.loss_weights[0] != report.loss_weights[1]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"a": torch.tensor(torch.nan), "b": torch.tensor(1.0)}, "must be finite"),
        ({"a": torch.tensor(0.0), "b": torch.tensor(1.0)}, "Validation loss of task 'a' is 0"),
        ({"c": torch.tensor(1.0)}, "Unknown task 'c'"),
        ({}, "at least one of the tasks"),
    ],
)
def test_bad_validation_losses_are_refused_before_anything_changes(losses, message):
    stage = Balancer(TASKS, loss="coba")
    stage.observe_validation({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        stage.observe_validation(losses)
    for key, value in stage.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_other_rules_ignore_validation_losses():
    stage = Balancer(TASKS)
    assert not stage.needs_validation
    stage.observe_validation({"nonsense": 3})


def test_every_rule_of_a_chain_gets_the_raw_validation_losses():
    stage = Balancer(TASKS, loss=("scaleinvls", "coba"), loss_options={"coba": {"warmup": 2}})
    assert stage.needs_validation
    stage.observe_validation({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert stage.loss_balancer.rule.rules[1].rule.first.tolist() == [1, 2]
    assert not Balancer(TASKS, loss=("scaleinvls", "uw")).needs_validation
