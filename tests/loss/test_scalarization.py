import pytest
import torch
from hypothesis import given

from balance import Balancer, loss_balancers
from tests.loss.derivatives import effective
from tests.strategies import losses

Z, W = [0.3, -1.0, 0.5], [0.2, 0.5, 0.3]
z, w = torch.tensor(Z, dtype=torch.float64), torch.tensor(W, dtype=torch.float64)


def smooth(L):
    return 0.7 * ((w * (L - z)) / 0.7).logsumexp(dim=0)


def augmented(L):
    return (w * (L - z)).max() + 0.2 * (L - z).sum()


def modified(L):
    return (w * (L - z + 0.2 * (L - z).sum())).max()


def cosmos(L):
    return w @ L - 3 * torch.nn.functional.cosine_similarity(w, L, dim=0)


def boundary(L):
    unit = w / w.norm()
    along = (L - z) @ unit
    return along + 2 * (L - z - along * unit).norm()


SCALARS = [
    ("stch", {"form": "plain", "mu": 0.7, "preference": W, "reference": Z}, smooth),
    ("tchebycheff", {"preference": W, "reference": Z, "rho": 0.2}, augmented),
    ("tchebycheff", {"preference": W, "reference": Z, "rho": 0.2, "form": "modified"}, modified),
    ("cosmos", {"preference": W, "penalty": 3.0}, cosmos),
    ("pbi", {"preference": W, "reference": Z, "theta": 2.0}, boundary),
]


@pytest.mark.parametrize(("name", "options", "scalar"), SCALARS)
@given(losses(min_tasks=3, max_tasks=3))
def test_weights_are_the_derivatives_of_the_scalar(name, options, scalar, L):
    leaf = L.clone().requires_grad_()
    expected = torch.autograd.grad(scalar(leaf), leaf)[0]
    torch.testing.assert_close(effective(loss_balancers.build(name, num_tasks=3, **options), L), expected)


@pytest.mark.parametrize("name", ["tchebycheff", "cosmos", "pbi"])
def test_one_task_keeps_its_direction(name):
    assert effective(loss_balancers.build(name, num_tasks=1), torch.tensor([3.0], dtype=torch.float64)).tolist() == [1.0]


@pytest.mark.parametrize("form", ["augmented", "modified"])
def test_equal_losses_share_the_gradient(form):
    rule = loss_balancers.build("tchebycheff", num_tasks=3, form=form)
    weights = effective(rule, torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([1 / 6, 0, 1 / 6])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.0])
def test_losses_on_the_direction_are_not_pushed_off_it_by_rounding(value):
    rule = loss_balancers.build("pbi", num_tasks=3, theta=100.0)
    weights = effective(rule, torch.full((3,), value, dtype=torch.float64))
    assert weights.tolist() == pytest.approx([3**-0.5] * 3)


def test_losses_of_zero_have_no_cosine():
    rule = loss_balancers.build("cosmos", num_tasks=2, preference=[1.0, 3.0])
    assert effective(rule, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 3]


def test_a_present_task_without_preference():
    for name in ("cosmos", "pbi", "tchebycheff"):
        rule = loss_balancers.build(name, num_tasks=2, preference=[1.0, 0.0])
        assert rule(torch.tensor([2.0]), present=torch.tensor([1])).tolist() == [0]


@pytest.mark.parametrize("form", ["log", "plain"])
@pytest.mark.parametrize("mu", [1e-300, 1e-3])
def test_a_small_mu_gives_the_largest_loss_all_weight(form, mu):
    rule = loss_balancers.build("stch", num_tasks=3, mu=mu, warmup_epochs=0, form=form)
    rule.end_epoch(torch.ones(3))
    weights = effective(rule, torch.tensor([1.0, 1e6, 5.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0, 3e-6 if form == "log" else 1 / 3, 0])


def test_a_task_that_is_absent_from_the_warm_up_gets_a_later_nadir():
    rule = loss_balancers.build("stch", num_tasks=3, warmup_epochs=1)
    L = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    nan = torch.nan
    for means, factors in (
        ([1.0, 1.0, 1.0], [1, 1, 1]),
        ([1.0, 4.0, nan], [2 * 2 / 3, 2 / 3, 1]),
        ([9.0, 9.0, 6.0], [3 * 0.5, 0.75, 0.75]),
    ):
        rule.end_epoch(torch.tensor(means))
        assert (effective(rule, L) * L).tolist() == pytest.approx(factors)


def test_preferences_of_absent_tasks_are_left_out():
    L, present = torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([0, 2])
    for name in ("tchebycheff", "pbi"):
        whole = loss_balancers.build(name, num_tasks=3, preference=W, reference=Z)
        smaller = loss_balancers.build(name, num_tasks=2, preference=[0.2, 0.3], reference=[0.3, 0.5])
        torch.testing.assert_close(whole(L, present=present), smaller(L))


def test_mgda_after_a_rule_that_switches_tasks_off():
    with pytest.warns(UserWarning, match="the tasks that tchebycheff switches off"):
        Balancer(2, loss="tchebycheff", gradient="mgda")
