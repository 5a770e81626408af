import pytest
import torch
from hypothesis import given
from torch import nn

from balance import Balancer, compose, gradient_balancers, loss_balancers
from balance.testing import check_gradient_balancer, check_loss_balancer
from tests.strategies import jacobians
from tests.test_balancer import TASKS, Network, assert_same, assert_same_state

J3 = torch.tensor([[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]], dtype=torch.float64)


def recorded(weights):
    """A gradient balancer that returns the next of the given weights, and counts its calls."""

    def rule(gramian):
        rule.calls += 1
        return torch.tensor(weights[rule.calls - 1], dtype=gramian.dtype)

    rule.calls = 0
    return rule


# --- every ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("scale", ["paper", "sum", "norm"])
def test_reused_weights_give_the_step_that_solved_weights_give(heads, scale, source):
    """On the same losses every step of a cycle has the same gradients; only the first solves."""
    rule = recorded([[1.0, 2.0, 3.0]] * 2)
    network = Network()
    balancer = Balancer(TASKS, loss="uw", gradient=compose.every(3, rule, 3), heads=heads, scale=scale, source=source)
    steps = []
    for _ in range(4):
        network.zero_grad()
        balancer.zero_grad()
        z = network.trunk(network.x)
        report = balancer.backward(network.losses(z), shared=network.shared(), features=z)
        steps.append(network.grads() | {str(k): s.grad for k, s in enumerate(balancer.loss.log_variances)})
        assert (report.gramian is None) == (len(steps) in (2, 3))
    assert rule.calls == 2
    for step in steps[1:]:
        assert_same(step, steps[0], rtol=1e-4, atol=1e-4)


def test_a_reused_step_is_one_backward_pass(monkeypatch):
    network = Network()
    balancer = Balancer(TASKS, gradient=compose.every(2, "mgda", 3))
    assert balancer.heads == "weighted"
    balancer.backward(network.losses(), shared=network.shared())
    passes = []

    def counting(function):
        def count(*args, **kwargs):
            inputs = kwargs.get("inputs") or args[1]
            passes.append(any(p is network.trunk[0].weight for p in inputs))
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(torch.autograd, "grad", counting(torch.autograd.grad))
    monkeypatch.setattr(torch.autograd, "backward", counting(torch.autograd.backward))
    balancer.backward(network.losses(), shared=network.shared())
    assert sum(passes) == 1


def test_a_task_without_weights_is_solved_at_once():
    rule = recorded([[1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    network = Network()
    balancer = Balancer(TASKS, gradient=compose.every(5, rule, 3))
    found = []
    for present in (("a", "b"), ("a", "b"), TASKS, ("a", "c")):
        losses = {t: v for t, v in network.losses().items() if t in present}
        found.append(balancer.backward(losses, shared=network.shared()).gradient_weights.tolist())
    assert found == [[1, 2], [1, 2], [3, 4, 5], [3, 5]]


def test_nash_update_every_is_every():
    def train(gradient, **options):
        network = Network()
        balancer = Balancer(TASKS, gradient=gradient, gradient_options=options)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        weights = []
        for _ in range(5):
            optimizer.zero_grad()
            weights.append(balancer.backward(network.losses(), shared=network.shared()).gradient_weights)
            optimizer.step()
        return torch.stack(weights)

    a = train("nashmtl", update_every=2)
    torch.testing.assert_close(a, train(compose.every(2, "nashmtl", 3)))
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])


# --- smoothed ----------------------------------------------------------------------------------------------------------


def test_smoothed_weights_are_a_moving_average():
    rule = compose.smoothed(recorded([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 0.75, 2)
    assert [rule(torch.eye(2)).tolist() for _ in range(3)] == [[1, 0], [0.75, 0.25], [0.5625, 0.4375]]


def test_smoothing_keeps_what_averages_keep():
    check_gradient_balancer(lambda K: compose.smoothed("mgda", 0.9, K), ("on_simplex", "permutation_equivariant"))


def test_smoothed_leaves_absent_tasks_alone():
    rule = compose.smoothed(recorded([[1.0, 2.0, 3.0], [5.0, 7.0], [1.0, 2.0, 3.0]]), 0.5, 3)
    rule(torch.eye(3))
    assert rule(torch.eye(2), present=torch.tensor([0, 2])).tolist() == [3, 5]
    assert rule(torch.eye(3)).tolist() == [2, 2, 4]


# --- grouped -----------------------------------------------------------------------------------------------------------


@given(jacobians(min_tasks=4, max_tasks=4))
def test_grouped_is_the_rule_on_the_sums_of_the_groups(J):
    groups = [[0, 3], [1], [2]]
    sums = torch.stack([J[group].sum(dim=0) for group in groups])
    d = compose.grouped("mgda", groups, 4)(J @ J.T) @ J
    torch.testing.assert_close(d, gradient_balancers.build("mgda")(sums @ sums.T) @ sums, atol=1e-7, rtol=1e-7)


def test_groups_of_one_change_nothing_and_absent_groups_take_no_part():
    rule = compose.grouped("nashmtl", [[0], [1], [2]], 3)
    torch.testing.assert_close(rule(J3 @ J3.T), gradient_balancers.build("nashmtl", num_tasks=3)(J3 @ J3.T))
    part = J3[[0, 2]]
    expected = gradient_balancers.build("nashmtl", num_tasks=2)(part @ part.T)
    torch.testing.assert_close(rule(part @ part.T, present=torch.tensor([0, 2])), expected)


def test_losses_reach_a_rule_within_rules():
    seen = []

    def rule(gramian, *, losses):
        seen.append(losses.tolist())
        return torch.ones(len(gramian), dtype=gramian.dtype)

    for made in (compose.every(1, rule, 3), compose.smoothed(rule, 0.5, 3), compose.grouped(rule, [[0, 1], [2]], 3)):
        network = Network()
        losses = {t: v / v.detach() for t, v in network.losses().items()}
        Balancer(TASKS, gradient=made).backward(losses, shared=network.shared())
    assert [[round(x, 5) for x in row] for row in seen] == [[1, 1, 1], [1, 1, 1], [2, 1]]


# --- all of them -------------------------------------------------------------------------------------------------------


def test_rules_made_of_rules_made_of_rules_resume(tmp_path):
    def build():
        network = Network()
        inner = compose.grouped("pcgrad", [[0, 1], [2]], 3, seed=3)
        balancer = Balancer(TASKS, gradient=compose.every(3, compose.smoothed(inner, 0.5, 3), 3))
        return network, balancer, torch.optim.Adam(network.parameters(), lr=0.01)

    def train(network, balancer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            balancer.backward(network.losses(), shared=network.shared())
            optimizer.step()

    straight, first, resumed = build(), build(), build()
    train(*straight, 10)
    train(*first, 5)
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(*resumed, 5)
    assert_same(dict(resumed[0].named_parameters()), dict(straight[0].named_parameters()), rtol=0, atol=0)
    assert_same_state(resumed[1].state_dict(), straight[1].state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose.every(0, "mgda", 3), "at least 1 step"),
        (lambda: compose.smoothed("mgda", 1.0, 3), "1 excluded"),
        (lambda: compose.grouped("mgda", [[0], [1]], 3), "exactly one group"),
        (lambda: compose.grouped("mgda", [[0, 1, 2], []], 3), "exactly one group"),
        (lambda: compose.every(2, "graddrop", 3), "sees the Jacobian"),
        (lambda: compose.every(2, "mdga", 3), "Did you mean 'mgda'"),
        (lambda: Balancer(3, loss=()), "at least one"),
        (lambda: Balancer(3, loss=("scaleinvls", "famo")), "must come first"),
        (lambda: Balancer(3, loss=("scaleinvls", "rlw"), loss_options={"uw": {}}), "Unknown loss balancer in loss_options"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- chains of loss balancers ------------------------------------------------------------------------------------------


def effective(rule, values):
    values = values.clone().requires_grad_()
    weighted = rule(values)
    return weighted.detach(), torch.autograd.grad(weighted.sum(), values)[0]


def test_rlwlog():
    """K times softmax weights on log losses, as in the IGB code."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    chain = Balancer(3, loss=("scaleinvls", "rlw"), loss_options={"rlw": {"scale": 3.0, "seed": 7}}).loss
    weights = loss_balancers.build("rlw", scale=3.0, seed=7)(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(effective(chain, L)[0], weights * L.log())


def test_uwlog():
    """Half of exp(-s) log L + s."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    chain = Balancer(3, loss=["scaleinvls", "uw"], loss_options={"uw": {"init": 0.3}}).loss.double()
    torch.testing.assert_close(effective(chain, L)[0], 0.5 * (torch.tensor(-0.3).exp() * L.log() + 0.3), rtol=1e-6, atol=1e-6)


def test_dwalog():
    """DWA's weights of the raw epoch means, on log losses."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    balancer, dwa = Balancer(3, loss=("scaleinvls", "dwa")), loss_balancers.build("dwa", num_tasks=3)
    for means in (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 1.9, 0.3])):
        balancer.loss.end_epoch(means)
        dwa.end_epoch(means)
    weights = effective(dwa, torch.ones(3, dtype=torch.float64))[1]
    torch.testing.assert_close(effective(balancer.loss, L)[0], weights * L.log())
    assert weights.max() > 1.05


def test_a_chain_with_famo_first_observes():
    network = Network()
    balancer = Balancer(TASKS, loss=("famo", "rlw"))
    assert balancer.needs_observation
    balancer.backward(network.losses())
    balancer.observe({t: 0.5 * v.detach() for t, v in network.losses().items()})
    assert balancer.loss.rules[0].logits.abs().sum() == 0 or balancer.loss.rules[0].steps.tolist() == [1, 1, 1]


@pytest.mark.parametrize("names", [("scaleinvls", "rlw"), ("scaleinvls", "uw"), ("go4align", "dwa"), ("famo", "rlw")])
def test_chains_keep_the_claims(names):
    claims = ("positive_weights", "separable")
    if "rlw" not in names:
        claims += ("loss_permutation_equivariant",)
    options = {"uw": {"init": -2.0}}
    check_loss_balancer(
        lambda K: Balancer(K, loss=names, loss_options={n: o for n, o in options.items() if n in names}).loss,
        claims,
        examples=20,
    )


def test_a_chain_moves_and_counts_as_one_module():
    balancer = Balancer(3, loss=("go4align", "uw"))
    assert isinstance(balancer.loss, nn.Module)
    assert len(list(balancer.parameters())) == 3
    assert any("cumulative_losses" in key for key in balancer.state_dict())
