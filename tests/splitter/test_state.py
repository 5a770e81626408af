import copy
import math

import pytest
import torch
from torch import nn

from balance import Balancer, Splitter
from balance.rules.compose import every
from tests.splitter.views import (
    RULES,
    TASKS,
    Network,
    assert_same,
    assert_same_state,
    data,
    gradients,
    merged,
    modes,
    splitter_of,
)

# Which tasks, and when state moves


@pytest.mark.parametrize("rule", [*RULES, None, "normalized"])
def test_an_absent_task_is_a_smaller_problem(rule):
    """Only the normalisation still divides by the weights of all tasks."""
    J = gradients(0, 3)
    found = merged(Splitter(TASKS, gradient=rule), [J[0], None, J[2]])
    expected = merged(Splitter(("a", "c"), gradient=rule), J[[0, 2]])
    torch.testing.assert_close(found, expected * (2 / 3 if rule in (None, "normalized") else 1))


@pytest.mark.parametrize("projection", ["after_norm", "before_norm"])
def test_an_absent_task_is_projected_off_nobody(projection):
    J = gradients(0, 3)
    found = merged(Splitter(TASKS, projection=projection), [J[0], None, J[2]])
    torch.testing.assert_close(found, merged(Splitter(("a", "c"), projection=projection), J[[0, 2]]) * 2 / 3)


def test_shortest_with_one_task_present():
    J = gradients(0, 2)
    torch.testing.assert_close(merged(Splitter(2, gradient=None, projection=2), [J[0], None]), J[0] / 2)


def test_state_of_an_absent_task_is_untouched():
    J = gradients(0, 3)
    splitter = Splitter(TASKS)
    merged(splitter, J)
    before = splitter.squares
    kept = before.clone()
    merged(splitter, [J[0] * 2, None, J[2] * 2])
    assert splitter.counts.tolist() == [2, 1, 2]
    assert splitter.squares[1] == kept[1]
    assert splitter.squares[0] > kept[0]
    assert before.tolist() == kept.tolist()  # replaced, not changed in place


def test_a_rule_with_state_by_task_must_know_who_is_present():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, gramian):
            return torch.ones(len(gramian))

    with pytest.raises(ValueError, match="keeps state by task"):
        merged(Splitter(TASKS, gradient=Stateful()), [*gradients(0, 2), None])


@modes
def test_a_second_backward_over_the_same_graph_repeats_the_first(mode):
    network = Network(splitter_of(TASKS, mode))
    network.step(data(1))
    other = sum(network.losses(data(3)).values())
    total = sum(network.losses(data(2)).values())
    parameters = list(network.parameters())
    first = torch.autograd.grad(total, parameters, retain_graph=True)
    state = copy.deepcopy(network.splitter.state_dict())
    second = torch.autograd.grad(total, parameters, retain_graph=True)
    assert_same_state(network.splitter, state)
    other.backward()  # moves the state, but not what belongs to the other graph
    state = copy.deepcopy(network.splitter.state_dict())
    third = torch.autograd.grad(total, parameters)
    assert_same_state(network.splitter, state)
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
        torch.testing.assert_close(c, a, rtol=0, atol=0)


def test_one_task_at_a_time_adds_up_to_all_at_once():
    network, twin = Network(Splitter(TASKS)), Network(Splitter(TASKS))
    for t in range(3):
        x = data(t)
        sum(network.losses(x).values()).backward()
        for loss in twin.losses(x).values():
            loss.backward(retain_graph=True)
        assert_same(twin.grads(), network.grads())
        torch.testing.assert_close(twin.splitter.squares, network.splitter.squares, rtol=1e-14, atol=0)
        assert twin.splitter.counts.tolist() == [t + 1] * 3


def test_a_balancer_above_sees_normalised_gradients():
    network, twin = Network(Splitter(TASKS)), Network(Splitter(TASKS))
    balancer = Balancer(TASKS, gradient=lambda G: torch.ones(3))
    for t in range(3):
        balancer.backward(network.losses(data(t)), shared=network.trunk.parameters())
        sum(twin.losses(data(t)).values()).backward()
    assert_same(network.grads(), twin.grads())
    torch.testing.assert_close(network.splitter.squares, twin.splitter.squares, rtol=1e-14, atol=0)


def test_accumulation_moves_the_state_once_for_each_backward():
    network, twin = Network(Splitter(TASKS)), Network(Splitter(TASKS))
    expected = []
    for t in range(2):
        twin.zero_grad()
        (sum(twin.losses(data(t)).values()) / 2).backward()
        expected.append(twin.grads())
        (sum(network.losses(data(t)).values()) / 2).backward()
    assert_same(network.grads(), {name: expected[0][name] + expected[1][name] for name in expected[0]})
    assert network.splitter.counts.tolist() == [2, 2, 2]


def test_gradients_of_gradients_are_refused():
    network = Network(Splitter(TASKS))
    (gradient,) = torch.autograd.grad(sum(network.losses(data()).values()), [network.trunk[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@modes
def test_resuming_is_not_stopping(mode):
    network = Network(splitter_of(TASKS, mode))
    for t in range(3):
        network.step(data(t))
    resumed = Network(splitter_of(TASKS, mode, seed=7), seed=1)
    resumed.load_state_dict(copy.deepcopy(network.state_dict()))
    for t in range(3, 6):
        assert_same(resumed.step(data(t)), network.step(data(t)), rtol=0, atol=0)
    assert_same_state(resumed.splitter, network.splitter.state_dict())


def test_a_checkpoint_of_other_tasks_is_refused():
    message = r"tasks \('a', 'b'\), but this Splitter is for \('b', 'a'\)"
    with pytest.raises(ValueError, match=message):
        Splitter(("b", "a")).load_state_dict(Splitter(("a", "b")).state_dict())


@modes
def test_a_state_dict_holds_tensors_only(mode, tmp_path):
    network = Network(splitter_of(("a", "Größe", "深さ"), mode), tasks=("a", "Größe", "深さ"))
    network.step(data())
    copied = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(copied, tmp_path / "network.pt")
    loaded = torch.load(tmp_path / "network.pt", weights_only=True)
    assert_same(loaded, copied, rtol=0, atol=0, equal_nan=True)
    network.load_state_dict(loaded)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    network = Network(Splitter(TASKS, gradient="pcgrad"))
    safetensors.save_file(network.state_dict(), tmp_path / "network.safetensors")
    network.load_state_dict(safetensors.load_file(tmp_path / "network.safetensors"))


# Failures


class Counting(nn.Module):
    """A rule that moves its state, and then returns a given result or raises a given error."""

    def __init__(self, *results):
        super().__init__()
        self.results = list(results)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, gramian):
        self.calls += 1
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.mark.parametrize("failure", [torch.ones(2), torch.full((3,), math.nan), ZeroDivisionError()], ids=str)
@pytest.mark.parametrize("wrap", [lambda rule: rule, lambda rule: every(1, rule, num_tasks=3)], ids=["rule", "every"])
def test_a_failed_pass_leaves_the_rule_as_it_was(failure, wrap):
    """Then the next pass over the same graph is its first."""
    rule = Counting(torch.ones(3), failure, 2 * torch.ones(3))
    splitter, J = Splitter(TASKS, gradient=wrap(rule)), gradients(0, 3)
    merged(splitter, J)
    state = copy.deepcopy(splitter.state_dict())
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    total = sum((view * row).sum() for view, row in zip(splitter(x).values(), J, strict=True))
    with pytest.raises((ValueError, ZeroDivisionError)):
        total.backward(retain_graph=True)
    assert_same_state(splitter, state)
    total.backward()
    torch.testing.assert_close(x.grad, 2 * J.sum(dim=0))
    assert rule.calls == 2


def test_weights_that_are_reused_in_a_failed_pass_are_not_used_up():
    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("uses", torch.zeros(()))

        def reuse(self, present=None):
            self.uses += 1
            return torch.ones(2)

        def forward(self, gramian):
            raise AssertionError

    splitter = Splitter(TASKS, gradient=Reusing())
    with pytest.raises(ValueError, match="must return 3 finite weights"):
        merged(splitter, gradients(0, 3))
    assert splitter.gradient_balancer.rule.uses == 0
