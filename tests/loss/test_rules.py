"""What is peculiar to single loss balancers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import loss_balancers
from balance.solvers import k_means_1d
from tests.strategies import losses


def effective(rule, values):
    values = values.clone().requires_grad_()
    return torch.autograd.grad(rule(values).sum(), values)[0]


@given(losses(), st.integers(1, 8))
def test_go4align_sums(L, groups):
    """Before grouping the weighted losses have the sum of the losses; grouping keeps the sum of the weights."""
    indicators = effective(loss_balancers.build("go4align", num_tasks=len(L), num_groups=len(L)), L)
    assert (indicators * L).sum().item() == pytest.approx(L.sum().item())
    weights = effective(loss_balancers.build("go4align", num_tasks=len(L), num_groups=groups), L)
    assert weights.sum().item() == pytest.approx(indicators.sum().item())
    labels = k_means_1d(indicators.numpy(), groups)
    for group in set(labels.tolist()):
        assert weights[labels == group].tolist() == pytest.approx(
            [indicators[labels == group].mean().item()] * (labels == group).sum()
        )


def test_go4align_does_not_underflow_after_a_long_history():
    rule = loss_balancers.build("go4align", num_tasks=2, step_size=1.0)
    rule.cumulative_losses += 1e6
    weights = effective(rule, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert weights.isfinite().all()
    assert (weights > 0).all()


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


def test_rlw_weights_are_a_softmax_with_the_given_sum():
    rule = loss_balancers.build("rlw", scale=3.0)
    weights = torch.stack([effective(rule, torch.ones(3, dtype=torch.float64)) for _ in range(2000)])
    assert weights.sum(dim=1).numpy() == pytest.approx(np.full(2000, 3.0))
    assert weights.mean(dim=0).tolist() == pytest.approx([1, 1, 1], abs=0.05)


def test_dwa_gives_equal_weights_to_equal_progress_and_more_to_slow_tasks():
    rule = loss_balancers.build("dwa", num_tasks=3)
    for means in ([2.0, 20.0, 1.0], [1.0, 10.0, 0.9]):
        rule.end_epoch(torch.tensor(means))
    weights = effective(rule, torch.ones(3, dtype=torch.float64))
    assert weights[0].item() == pytest.approx(weights[1].item())
    assert weights[2] > 1 > weights[0]


@pytest.mark.parametrize("mode", ["epoch", "window"])
def test_dwa_names_a_task_whose_older_mean_is_zero(mode):
    rule = loss_balancers.build("dwa", num_tasks=2, mode=mode, window=1)
    for means in ([1.0, 0.0], [1.0, 1.0]):
        if mode == "epoch":
            rule.end_epoch(torch.tensor(means))
            continue
        if means[1] == 0:
            rule(torch.tensor(means))
    with pytest.raises(ValueError, match="Mean loss of task '1' was 0"):
        rule(torch.ones(2))


@pytest.mark.parametrize("name", loss_balancers.names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(name, dtype):
    assert loss_balancers.build(name, num_tasks=3)(torch.ones(3, dtype=dtype)).dtype == dtype


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


@pytest.mark.parametrize("grouping", ["kmeans", "spectral", "sdp"])
def test_go4align_groupings_agree_where_groups_are_well_apart(grouping):
    """Inverse losses near 1, near 3 and near 6: three groups, whatever forms them."""
    L = 1 / torch.tensor([1.0, 1.05, 3.0, 3.1, 6.0], dtype=torch.float64)
    weights = effective(loss_balancers.build("go4align", num_tasks=5, num_groups=3, grouping=grouping), L)
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert len(set(weights.tolist())) == 3
    exact = effective(loss_balancers.build("go4align", num_tasks=5, num_groups=3), L)
    torch.testing.assert_close(weights, exact)


@pytest.mark.parametrize("grouping", ["spectral", "sdp"])
@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0, 1.0], [1.0, 2.0], [1e-6, 1.0, 1e6]])
def test_go4align_groupings_on_degenerate_indicators(grouping, values):
    rule = loss_balancers.build("go4align", num_tasks=len(values), num_groups=2, grouping=grouping)
    assert effective(rule, torch.tensor(values, dtype=torch.float64)).isfinite().all()


def test_famo_weights_are_not_its_softmax():
    """Believed, but the weights of the losses are z / (D S)."""
    rule = loss_balancers.build("famo", num_tasks=2)
    weights = effective(rule, torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert rule.logits.softmax(dim=0).tolist() == [0.5, 0.5]
    assert weights.tolist() == pytest.approx([0.8, 0.2])
