"""Behaviour of single loss balancers, and of all of them where types, devices and failures are concerned."""

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import loss_balancers
from balance.loss import groups as go4align_groups
from balance.rules.generator import SeededGenerator
from balance.solvers.kmeans import k_means_1d
from tests.stage.three_tasks import assert_same_state
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
    with pytest.raises(ValueError, match=r"Mean loss of task '1' is 0, .*'dwa' divides by it"):
        rule(torch.ones(2))


@pytest.mark.parametrize("name", loss_balancers.names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_of_every_dtype_give_the_float64_result_in_their_dtype(name, dtype):
    L = torch.tensor([0.0625, 1.0, 24.0], dtype=dtype).requires_grad_()  # exact in every dtype
    weighted = loss_balancers.build(name, num_tasks=3)(L)
    gradient = torch.autograd.grad(weighted.sum(), L)[0]
    assert weighted.dtype == gradient.dtype == dtype
    exact = L.detach().double().requires_grad_()
    expected = loss_balancers.build(name, num_tasks=3)(exact)
    tolerances = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(weighted.double(), expected, **tolerances)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), exact)[0], **tolerances)


def test_tiny_losses_and_bounds_do_not_underflow_in_half_precision():
    L = torch.tensor([0.0, 1.0], dtype=torch.float16)  # where 1e-8 is zero
    assert loss_balancers.build("famo", num_tasks=2)(L).isfinite().all()
    assert loss_balancers.build("scaleinvls", min_losses=[-1e-8, 0.0])(L).isfinite().all()
    L = torch.tensor([1e-6, 1.0, 1e4], dtype=torch.float16)  # weights beyond the range of float16
    assert loss_balancers.build("go4align", num_tasks=3, num_groups=3)(L).isfinite().all()


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


# --- default device and default dtype -------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}
SMALL = {"igbv2": {"buffer_size": 64}, "dwa": {"mode": "epoch"}}


def run(rule, sequence, per_epoch=8):
    """Weighted losses at each row. The rule observes each row scaled by 0.9, and ends epochs."""
    found = []
    for step, row in enumerate(sequence):
        found.append(rule(row))
        if getattr(rule, "needs_observation", False):
            rule.observe(0.9 * row)
        if hasattr(rule, "end_epoch") and step % per_epoch == per_epoch - 1:
            rule.end_epoch(row)
    return torch.stack(found)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", loss_balancers.names())
def test_default_device_and_default_dtype_change_nothing(name, context):
    """Long enough for igbv2 to train (step 50) and to act (step 40). A module goes on from its state_dict."""
    sequence = 0.5 + torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = loss_balancers.build(name, num_tasks=3, **SMALL.get(name, {}))
    expected = run(rule, sequence)
    expected_end = run(rule, sequence[:10])
    with CONTEXTS[context]():
        rule, other = (loss_balancers.build(name, num_tasks=3, **SMALL.get(name, {})) for _ in range(2))
        assert torch.equal(run(rule, sequence), expected)
        if isinstance(rule, torch.nn.Module):
            other.load_state_dict(rule.state_dict())
            assert {value.device.type for value in other.state_dict().values()} <= {"cpu"}
            assert_same_state(other.state_dict(), rule.state_dict())
            rule = other
        assert torch.equal(run(rule, sequence[:10]), expected_end)


@pytest.mark.parametrize("options", [{"name": "dwa", "mode": "window", "window": 2}, {"name": "famo", "next_batch": True}])
def test_default_device_changes_nothing_in_other_modes(options):
    sequence = 0.5 + torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = run(loss_balancers.build(**options, num_tasks=3), sequence)
    with torch.device("meta"):
        assert torch.equal(run(loss_balancers.build(**options, num_tasks=3), sequence), expected)


@pytest.mark.parametrize("name", ["scaleinvls", "famo"])
def test_default_device_changes_nothing_of_bounds(name):
    L, present = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([0, 2])
    expected = loss_balancers.build(name, num_tasks=3, min_losses=[1.0, 0.0, -1.0])(L, present=present)
    with torch.device("meta"):
        weighted = loss_balancers.build(name, num_tasks=3, min_losses=[1.0, 0.0, -1.0])(L, present=present)
    assert torch.equal(weighted, expected)


def test_log_variances_have_the_default_dtype():
    with default_dtype(torch.float64):
        assert {p.dtype for p in loss_balancers.build("uw", num_tasks=2).parameters()} == {torch.float64}
    assert {p.dtype for p in loss_balancers.build("uw", num_tasks=2, init=1.0).parameters()} == {torch.float32}


@pytest.mark.parametrize("context", CONTEXTS)
def test_seeded_generator_draws_the_same_numbers_whatever_the_defaults(context):
    def draw(generator):
        return generator.normal(2, 3), generator.uniform(4), generator.permutations(2, 5)

    expected = draw(SeededGenerator(3))
    with CONTEXTS[context]():
        found = draw(SeededGenerator(3))
    assert [(t.dtype, t.device.type) for t in found] == [(torch.float64, "cpu"), (torch.float32, "cpu"), (torch.int64, "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_seeded_generator_starts_again_with_another_seed():
    generator = SeededGenerator(3)
    generator.normal(5)
    generator.reseed(4)
    assert torch.equal(generator.normal(5), SeededGenerator(4).normal(5))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_generator_goes_on_alike_and_independently(duplicate):
    generator = SeededGenerator(3)
    generator.normal(5)
    other = duplicate(generator)
    expected = generator.normal(5)
    assert torch.equal(other.normal(5), expected)


# --- epochs and failures ----------------------------------------------------------------------------------------------


def test_rules_that_update_once_per_epoch_say_so():
    built = {name: loss_balancers.build(name, num_tasks=2) for name in loss_balancers.names()}
    assert {name for name, rule in built.items() if getattr(rule, "needs_epochs", False)} == {"dwa", "igbv1", "igbv2"}
    assert not loss_balancers.build("dwa", num_tasks=2, mode="window").needs_epochs


@pytest.mark.parametrize("name", ["scaleinvls", "go4align", "igbv1", "igbv2"])
def test_a_loss_of_zero_is_explained_by_a_task_without_labels(name):
    cause = r'no labels in this batch\. Leave the task out of the dict, or set zero="absent"\. Otherwise (add|give)'
    rule = loss_balancers.build(name, num_tasks=2)
    with pytest.raises(ValueError, match=rf"Loss of task '1' is 0, but must be above 0, because '{name}' .*{cause}"):
        rule(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"Loss of task '0' is -1, [^.]*\. (Add|Give)"):
        rule(torch.tensor([-1.0, 0.0]))


def failing(rule):
    """Calls that raise: a wrong number of losses, and losses outside the rule's domain."""
    kind = type(rule).__name__
    if kind != "RandomLossWeighting":  # which takes any number of losses
        yield lambda: rule(torch.ones(4))
    if kind in ("FAMO", "GO4Align", "IGBv1", "IGBv2"):
        yield lambda: rule(torch.tensor([1.0, 2.0, -3.0]))
        yield lambda: rule(torch.tensor([1.0, torch.nan, 3.0]))
    if kind in ("IGBv1", "IGBv2"):
        yield lambda: rule.end_epoch(torch.tensor([1.0, 0.0, 1.0]))
    if getattr(rule, "needs_observation", False):
        rule(torch.ones(3))  # losses that remain to be observed
        yield lambda: rule.observe(torch.tensor([1.0, 2.0, -3.0]))


STATEFUL = [
    {"name": "rlw"},
    {"name": "uw"},
    {"name": "dwa"},
    {"name": "dwa", "mode": "window", "window": 2},
    {"name": "famo"},
    {"name": "famo", "next_batch": True},
    {"name": "go4align"},
    {"name": "igbv1", "base_epoch": 0},
    {"name": "igbv2", "base_epoch": 0, "buffer_size": 64},
]


def test_every_stateful_rule_is_listed():
    built = {name: loss_balancers.build(name, num_tasks=3) for name in loss_balancers.names()}
    assert {options["name"] for options in STATEFUL} == {n for n, rule in built.items() if isinstance(rule, torch.nn.Module)}


@pytest.mark.parametrize("options", STATEFUL, ids=str)
@pytest.mark.parametrize("steps", [1, 50])
def test_a_rule_that_raises_leaves_its_state_as_before(options, steps):
    """Step 50 is one at which igbv2 trains."""
    rule = loss_balancers.build(**options, num_tasks=3)
    run(rule, 0.5 + torch.rand(steps, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for call in failing(rule):
        before = copy.deepcopy(rule.state_dict())
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            call()
        assert_same_state(rule.state_dict(), before)


@pytest.mark.parametrize("mode", ["epoch", "window"])
def test_dwa_leaves_its_state_as_before_when_a_mean_is_zero(mode):
    rule = loss_balancers.build("dwa", num_tasks=2, mode=mode, window=1)
    rule.history[:] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match="Mean loss of task '1' is 0"):
        rule(torch.ones(2))
    assert_same_state(rule.state_dict(), before)


def test_go4align_leaves_its_history_as_before_when_the_grouping_fails(monkeypatch):
    def fail(points, num_groups):
        raise ImportError("No module named 'cvxpy'")

    rule = loss_balancers.build("go4align", num_tasks=2, grouping="sdp")
    monkeypatch.setitem(go4align_groups._GROUPINGS, "sdp", fail)
    with pytest.raises(ImportError):
        rule(torch.ones(2))
    assert rule.cumulative_losses.tolist() == [0, 0]
