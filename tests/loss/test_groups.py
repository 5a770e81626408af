import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balance import loss_balancers
from balance.loss import groups as go4align_groups
from balance.solvers.kmeans import k_means_1d
from tests.loss.derivatives import effective
from tests.strategies import losses


@given(losses(), st.integers(1, 8))
def test_go4align_sums(L, groups):
    """Before grouping the weighted losses have the sum of the losses; grouping keeps the sum of the weights."""
    indicators = effective(loss_balancers.build("go4align", num_tasks=len(L), num_groups=len(L)), L)
    assert (indicators * L).sum().item() == pytest.approx(L.sum().item())
    weights = effective(loss_balancers.build("go4align", num_tasks=len(L), num_groups=groups), L)
    assert weights.sum().item() == pytest.approx(indicators.sum().item())
    labels = k_means_1d(indicators, groups).numpy()
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


def test_go4align_leaves_its_history_as_before_when_the_grouping_fails(monkeypatch):
    def fail(points, num_groups):
        raise ImportError("No module named 'cvxpy'")

    rule = loss_balancers.build("go4align", num_tasks=2, grouping="sdp")
    monkeypatch.setitem(go4align_groups._GROUPINGS, "sdp", fail)
    with pytest.raises(ImportError):
        rule(torch.ones(2))
    assert rule.cumulative_losses.tolist() == [0, 0]


def weights_over_time(rule, rows):
    return [effective(rule, torch.tensor(row, dtype=torch.float64)) for row in rows]


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_go4align_with_a_relative_step_weighs_a_scaled_loss_inversely(a, b):
    """With K groups the weighted losses have ratios that do not depend on the scale of any loss, after any history."""
    rows = [[3.0, 0.5], [2.0, 0.4], [1.0, 0.1]]
    scaled = [[a * x, b * y] for x, y in rows]
    plain, other = (
        weights_over_time(loss_balancers.build("go4align", num_tasks=2, step_size=1.0, relative_step=True), history)
        for history in (rows, scaled)
    )
    for weights, others, (x, y) in zip(plain, other, rows, strict=True):
        assert (others[0] * a * x / (others[1] * b * y)).item() == pytest.approx((weights[0] * x / (weights[1] * y)).item())


def test_go4align_with_a_relative_step_accumulates_relative_losses():
    rule = loss_balancers.build("go4align", num_tasks=2, step_size=0.5, relative_step=True)
    weights_over_time(rule, [[10.0, 2.0], [5.0, 2.0]])
    assert rule.cumulative_losses.tolist() == [1.5, 2.0]
    restored = loss_balancers.build("go4align", num_tasks=2, step_size=0.5, relative_step=True)
    restored.load_state_dict(rule.state_dict())
    assert effective(restored, torch.tensor([5.0, 2.0], dtype=torch.float64)).tolist() == pytest.approx(
        (torch.tensor([-0.5 * 2.0, -0.5 * 3.0]).softmax(0) * torch.tensor([7 / 5, 7 / 2])).tolist()
    )


def test_go4align_with_a_relative_step_takes_the_first_loss_of_a_task_that_was_absent():
    rule = loss_balancers.build("go4align", num_tasks=2, relative_step=True)
    rule(torch.tensor([4.0]), present=torch.tensor([0]))
    rule(torch.tensor([2.0, 8.0]))
    assert rule.initial_losses.tolist() == [4.0, 8.0]
    assert rule.cumulative_losses.tolist() == [1.5, 1.0]


def test_go4align_without_a_relative_step_keeps_the_state_of_earlier_checkpoints():
    assert list(loss_balancers.build("go4align", num_tasks=2).state_dict()) == ["cumulative_losses"]
