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
