import pytest
import torch
from hypothesis import given

from balance import Balancer, compose, gradient_balancers
from balance.gradient import bargaining
from balance.testing import check_gradient_balancer
from tests.rules.compositions import J3, compositions
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state
from tests.strategies import jacobians
from tests.test_config import build


def recorded(weights):
    """A gradient balancer that returns the next of the given weights, and counts its calls."""

    def rule(gramian):
        rule.calls += 1
        return torch.tensor(weights[rule.calls - 1], dtype=gramian.dtype)

    rule.calls = 0
    return rule


# Every


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
        steps.append(network.grads() | {str(k): s.grad for k, s in enumerate(balancer.loss_balancer.rule.log_variances)})
        assert (report.gramian is None) == (len(steps) in (2, 3))
    assert rule.calls == 2
    for step in steps[1:]:
        assert_same(step, steps[0], rtol=1e-4, atol=1e-4)


def test_a_reused_step_is_one_backward_pass():
    network = Network()
    balancer = Balancer(TASKS, gradient=compose.every(2, "mgda", 3))
    assert balancer.heads == "weighted"
    counts = []
    for _ in range(2):
        passes, z = [], network.trunk(network.x)
        z.grad_fn.register_prehook(lambda gradients, passes=passes: passes.append(gradients) or None)
        balancer.backward(network.losses(z), shared=network.shared())
        counts.append(len(passes))
    assert counts[0] >= 3
    assert counts[1] == 1


def test_weights_are_reused_for_exactly_the_tasks_that_they_were_solved_for():
    """With an absent task the step is the step of the smaller problem: weights of two solves never meet in a step."""
    rule = compose.every(3, recorded([[1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0], [8.0], [9.0, 10.0]]), 3)
    weights = []
    for tasks in ([0, 1], [0, 1], None, None, [0, 2], [0], [0, 2]):
        present = None if tasks is None else torch.tensor(tasks)
        reused = rule.reuse(present)
        solved = rule(torch.eye(len(tasks or (0, 1, 2))), present=present) if reused is None else reused
        weights.append(solved.tolist())
    assert weights == [[1, 2], [1, 2], [3, 4, 5], [3, 4, 5], [6, 7], [8], [9, 10]]
    assert rule.weights.isnan().tolist() == [False, True, False]
    assert rule.reuse(torch.tensor([0, 1, 2])) is None


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_step_with_absent_tasks_is_that_of_the_smaller_problem(n):
    network = Network()
    balancer = Balancer(TASKS, gradient=compose.every(n, "mgda", 3))
    for present in (TASKS, ("a",), ("a", "b"), ("b", "c"), ("a", "c"), ("a", "b")):
        losses = {task: loss for task, loss in network.losses().items() if task in present}
        report = balancer.backward(losses, shared=network.shared())
        small = Balancer(present, gradient="mgda")
        losses = {task: loss for task, loss in network.losses().items() if task in present}
        expected = small.backward(losses, shared=network.shared())
        torch.testing.assert_close(report.gradient_weights, expected.gradient_weights)


def test_all_tasks_by_index_are_all_tasks():
    rule = compose.every(2, recorded([[1.0, 2.0]]), 2)
    rule(torch.eye(2))
    assert rule.reuse(torch.tensor([0, 1])).tolist() == [1, 2]
    assert rule.reuse() is None


@pytest.mark.parametrize("wrong", [torch.ones(()), torch.ones(3), torch.tensor([1.0, torch.nan]), [1.0, 2.0]], ids=str)
def test_wrong_weights_of_a_rule_change_no_state(wrong):
    for make in (
        lambda rule: compose.every(2, rule, 2),
        lambda rule: compose.smoothed(rule, 0.5, 2),
        lambda rule: compose.grouped(rule, [[0], [1]], 2),
    ):
        results = [torch.ones(2), wrong]
        rule = make(lambda gramian: results.pop(0))  # noqa: B023 - called at once
        rule(torch.eye(2))
        before = {name: value.clone() for name, value in rule.state_dict().items()}
        with pytest.raises(ValueError, match="must return 2 finite weights"):
            rule(torch.eye(2))
        assert_same_state(rule.state_dict(), before)


def solves(monkeypatch):
    """A list that gets an entry for every bargain."""
    calls, solve = [], bargaining.bargaining_weights
    monkeypatch.setattr(bargaining, "bargaining_weights", lambda G: calls.append(len(G)) or solve(G))
    return calls


@compositions
def test_a_rule_within_rules_reuses_its_weights(make, monkeypatch):
    calls, network = solves(monkeypatch), Network()
    balancer = Balancer(TASKS, gradient=make(compose.every(5, "nashmtl", 3)))
    reports = [balancer.backward(network.losses(), shared=network.shared()) for _ in range(10)]
    assert len(calls) == 2
    assert [report.gramian is None for report in reports] == ([False] + [True] * 4) * 2


@compositions
def test_reuse_is_counted_once_for_each_step(make):
    """A composition asks its rule once; asked without a solve in between, it answers n - 1 times."""
    rule = make(compose.every(3, "nashmtl", 3))
    assert rule.reuses
    for _ in range(2):
        assert rule.reuse() is None
        rule(J3 @ J3.T)
        assert [rule.reuse() is None for _ in range(3)] == [False, False, True]
    assert make("nashmtl").reuses is False
    assert make("mgda").reuse() is None


def test_smoothed_averages_once_for_each_step():
    inner = recorded([[1.0, 0.0], [0.0, 1.0]])
    rule = compose.smoothed(compose.every(2, inner, 2), 0.75, 2)
    weights = []
    for _ in range(4):
        reused = rule.reuse()
        weights.append((rule(torch.eye(2)) if reused is None else reused).tolist())
    assert weights == [[1, 0], [1, 0], [0.75, 0.25], [0.5625, 0.4375]]
    assert inner.calls == 2


def test_grouped_gives_reused_weights_to_the_tasks():
    rule = compose.grouped(compose.every(3, recorded([[1.0, 2.0], [3.0, 4.0], [5.0]]), 2), [[0, 2], [1]], 3)
    assert rule(torch.eye(3)).tolist() == [1, 2, 1]
    assert rule.reuse().tolist() == [1, 2, 1]
    part = torch.tensor([0, 1])  # of the same groups, but the gradient of the first is another
    assert rule.reuse(part) is None
    assert rule(torch.eye(2), present=part).tolist() == [3, 4]
    assert rule.reuse(part).tolist() == [3, 4]
    assert rule.reuse(torch.tensor([0, 2])) is None
    assert rule(torch.eye(2), present=torch.tensor([0, 2])).tolist() == [5, 5]
    assert rule.reuse() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: compose.every(2, compose.every(2, "mgda", 3), 3),
        lambda: compose.every(2, compose.smoothed(compose.every(2, "mgda", 3), 0.5, 3), 3),
    ],
)
def test_weights_are_reused_in_one_place_only(make):
    with pytest.raises(ValueError, match=r"one place only, but got every\(.*Use only compose\.every\(n, rule, num_tasks\)"):
        make()


def test_a_command_line_reuses_weights_in_one_place_only():
    with pytest.raises(ValueError, match=r"Unknown key 'gradient\.update_every'"):
        build("ls", "nashmtl", "balancer.every=3", "gradient.update_every=2")
    assert build("ls", "nashmtl", "balancer.every=3").gradient_balancer.rule.n == 3
    assert build("ls", "nashmtl", "balancer.smoothing=0.5", "balancer.every=2").gradient_balancer.rule.reuses


def test_nash_weights_are_used_for_two_steps():
    network = Network()
    balancer = Balancer(TASKS, gradient=compose.every(2, "nashmtl", 3))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    weights = []
    for _ in range(5):
        optimizer.zero_grad()
        weights.append(balancer.backward(network.losses(), shared=network.shared()).gradient_weights)
        optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


# Smoothed


def test_smoothed_weights_are_a_moving_average():
    rule = compose.smoothed(recorded([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 0.75, 2)
    assert [rule(torch.eye(2)).tolist() for _ in range(3)] == [[1, 0], [0.75, 0.25], [0.5625, 0.4375]]


@pytest.mark.parametrize("beta", [-0.25, 1.0, 1.5])
def test_smoothing_out_of_range(beta):
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, 1 excluded"):
        compose.smoothed("mgda", beta, 3)


def test_smoothing_by_zero_changes_nothing():
    rule = compose.smoothed(recorded([[1.0, 0.0], [0.0, 1.0]]), 0.0, 2)
    assert [rule(torch.eye(2)).tolist() for _ in range(2)] == [[1, 0], [0, 1]]


def test_smoothing_keeps_what_averages_keep():
    check_gradient_balancer(lambda K: compose.smoothed("mgda", 0.9, K), ("on_simplex", "permutation_equivariant"))


def test_smoothed_leaves_absent_tasks_alone():
    rule = compose.smoothed(recorded([[1.0, 2.0, 3.0], [5.0, 7.0], [1.0, 2.0, 3.0]]), 0.5, 3)
    rule(torch.eye(3))
    assert rule(torch.eye(2), present=torch.tensor([0, 2])).tolist() == [3, 5]
    assert rule(torch.eye(3)).tolist() == [2, 2, 4]


# Grouped


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


# All of them


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
