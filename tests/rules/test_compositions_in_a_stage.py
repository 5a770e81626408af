import pytest
import torch
from torch import nn

from balance import Balancer, compose, gradient_balancers
from balance.rules.options import describe
from tests.rules.compositions import COMPOSITIONS, J3, compositions
from tests.stage.three_tasks import TASKS, Network, assert_same_state
from tests.test_config import build

# The seed of the stage


def draws(gradient, seed, **options):
    return permutations(Balancer(3, gradient=gradient, seed=seed, **options))


def permutations(balancer):
    """Draws of the rule inside all compositions and adapters of a balancer."""
    rule = balancer.gradient_balancer
    while not hasattr(rule, "random"):
        rule = rule.rule
    return rule.random.permutations(4, 5).tolist()


@compositions
def test_the_seed_of_the_stage_reaches_a_rule_that_is_given_by_name(make):
    assert draws(make("pcgrad"), 0) == draws("pcgrad", 0)
    assert draws(make("pcgrad"), 1) == draws("pcgrad", 1) != draws("pcgrad", 0)
    rule = make("pcgrad")
    assert draws(rule, 1) == draws(rule, 1)


@compositions
def test_a_seed_that_the_user_chose_stays(make):
    expected = gradient_balancers.build("pcgrad", seed=7).random.permutations(4, 5).tolist()
    assert draws(make("pcgrad", seed=7), 0) == expected
    assert draws(make(gradient_balancers.build("pcgrad", seed=7)), 0) == expected


def test_the_seed_of_a_run_reaches_rules_within_rules():
    balancer = build("ls", "pcgrad", "balancer.smoothing=0.5", "balancer.every=2")
    assert permutations(balancer) == draws("pcgrad", 5)


def test_the_seed_of_the_stage_reaches_rules_that_are_functions(monkeypatch):
    monkeypatch.setattr(gradient_balancers, "_methods", dict(gradient_balancers._methods))

    @gradient_balancers.register("drawn")
    def drawn(gramian, *, seed: int = 0):
        return torch.full((len(gramian),), float(seed))

    plain, wrapped = Balancer(2, gradient="drawn", seed=3), Balancer(2, gradient=compose.every(1, "drawn", 2), seed=3)
    G = torch.eye(2)
    assert wrapped.gradient_balancer.rule(G).tolist() == plain.gradient_balancer.rule(G).tolist() == [7, 7]


# Rules with state by task


class Memory(nn.Module):
    """A rule with state by task that takes no indices of the present tasks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, gramian):
        self.mean = 0.9 * self.mean[: len(gramian)] + 0.1 * gramian.diagonal()
        return 1 / self.mean.sqrt()


@pytest.mark.parametrize("make", [lambda rule: rule, *COMPOSITIONS.values()], ids=["rule", *COMPOSITIONS])
def test_a_rule_that_keeps_state_by_task_is_refused_when_a_task_is_absent(make):
    rule, network = make(Memory()), Network()
    balancer = Balancer(TASKS, gradient=rule)
    balancer.backward(network.losses(), shared=network.shared())
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    losses = {task: loss for task, loss in network.losses().items() if task != "b"}
    with pytest.raises(ValueError, match=r"Memory keeps state by task.*Give its forward a keyword present=None"):
        balancer.backward(losses, shared=network.shared())
    assert_same_state(rule.state_dict(), before)


def test_state_by_group_is_accepted_while_every_group_is_present():
    class ByGroup(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, gramian):
            return torch.ones(2)

    rule = compose.grouped(ByGroup(), [[0, 1], [2]], 3)
    assert rule(torch.eye(2), present=torch.tensor([0, 2])).tolist() == [1, 1]
    with pytest.raises(ValueError, match="keeps state by task"):
        rule(torch.eye(2), present=torch.tensor([0, 1]))


def test_a_chain_refuses_absent_tasks_before_any_of_its_rules_changes():
    chain = Balancer(TASKS, loss=("famo", "igbv2")).loss_balancer.rule
    chain(torch.full((3,), 100.0))
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    with pytest.raises(ValueError, match="IGBv2 keeps state by task"):
        chain(torch.full((2,), 100.0), present=torch.tensor([0, 2]))
    assert_same_state(chain.state_dict(), before)


# What a composition says of itself


@compositions
def test_traits_are_those_of_the_rule_within(make):
    assert (make("nashmtl").heads, make("nashmtl").fixed_length) == ("weighted", True)
    assert (make("pcgrad").heads, make("pcgrad").fixed_length) == ("unweighted", False)
    assert (make(torch.diagonal).heads, make(torch.diagonal).fixed_length) == ("unweighted", False)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda: compose.every(5, "nashmtl", 3, max_norm=2.0), "every(5, nashmtl(max_norm=2.0))"),
        (lambda: compose.smoothed("mgda", 0.9, 3), "smoothed(mgda, beta=0.9)"),
        (lambda: compose.grouped("cagrad", ((0, 1), [2]), 3, c=0.9), "grouped(cagrad(c=0.9), groups=[[0, 1], [2]])"),
        (lambda: compose.every(2, compose.smoothed(Memory(), 0.5, 3), 3), "every(2, smoothed(Memory, beta=0.5))"),
        (lambda: compose.every(2, gradient_balancers.build("cagrad", c=0.9), 3), "every(2, cagrad(c=0.9))"),
        (
            lambda: compose.every(2, gradient_balancers.build("pcgrad", order="fixed", num_tasks=3), 3),
            "every(2, pcgrad(order='fixed'))",
        ),
        (lambda: Balancer(3, loss=("scaleinvls", "uw")).loss_balancer.rule, "chain(scaleinvls, uw)"),
    ],
)
def test_repr(rule, text):
    assert repr(rule()) == text
    assert describe(rule()) == text


def test_state_has_its_values_on_any_default_device():
    with torch.device("meta"):
        rules = [compose.every(2, "nashmtl", 3), compose.smoothed("mgda", 0.5, 3), compose.grouped("mgda", [[0], [1, 2]], 3)]
    for rule in rules:
        assert {buffer.device.type for buffer in rule.buffers()} == {"cpu"}
        assert rule(J3 @ J3.T).device.type == "cpu"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose.every(0, "mgda", 3), "at least 1 step"),
        (lambda: compose.every(2, torch.diagonal, 3, c=0.4), "Options are for registered names"),
        (lambda: compose.smoothed("mgda", 1.0, 3), "1 excluded"),
        (lambda: compose.grouped("mgda", [[0], [1]], 3), "exactly one group"),
        (lambda: compose.grouped("mgda", [[0, 1, 2], []], 3), "exactly one group"),
        (lambda: compose.every(2, "graddrop", 3), "sees the Jacobian"),
        (lambda: compose.every(2, "nashmtl", 3, max_norm=0.0), "must be positive or None"),
        (lambda: compose.smoothed("cagrad", 0.5, 3, c=-1.0), "must not be negative"),
        (lambda: compose.every(2, "mdga", 3), "Did you mean 'mgda'"),
        (lambda: Balancer(3, loss=()), "at least one"),
        (lambda: Balancer(3, loss=("scaleinvls", "famo")), "must come first"),
        (lambda: Balancer(3, loss=("scaleinvls", "rlw"), loss_options={"uw": {}}), "Unknown loss balancer in loss_options"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
