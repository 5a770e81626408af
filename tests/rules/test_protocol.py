import dataclasses

import pytest
import torch
from torch import nn

from balance import Balancer, gradient_balancers
from balance.rules.context import Context, TaskError
from balance.rules.protocol import adapt_gradient_balancer, adapt_loss_balancer, takes

SOME = Context(torch.tensor([0, 2]), 3, tasks=("a", "c"))


class Observer:
    """A loss balancer whose forward accepts absent tasks, and whose observe has no keyword for them."""

    def __init__(self):
        self.observed = []

    def __call__(self, losses, present=None):
        return losses

    def observe(self, losses):
        self.observed.append(losses.tolist())


def test_observe_gets_present_only_where_it_takes_it():
    rule = Observer()
    adapted = adapt_loss_balancer(rule)
    assert adapted.observes
    assert adapted.needs_observation
    assert adapted.learns
    adapted.observe(torch.ones(2), SOME)
    adapted.observe(torch.ones(3), Context.of_all(3))
    assert rule.observed == [[1, 1], [1, 1, 1]]


def test_observe_validation_gets_present_only_where_it_takes_it():
    class Rule:
        def __init__(self):
            self.observed = []

        def __call__(self, losses):
            return losses

        def observe_validation(self, losses):
            self.observed.append(losses.tolist())

    rule = Rule()
    adapted = adapt_loss_balancer(rule)
    assert adapted.needs_validation
    assert not adapted.needs_observation
    adapted.observe_validation(torch.ones(2), SOME)
    adapted.observe_validation(torch.ones(3), Context.of_all(3))
    assert rule.observed == [[1, 1], [1, 1, 1]]
    rule.needs_validation = False
    assert not adapted.needs_validation
    plain = adapt_loss_balancer(lambda losses: losses)
    plain.observe_validation(torch.ones(3), SOME)
    assert not plain.needs_validation


class PresentObserver(Observer):
    needs_observation = False
    needs_epochs = True

    def observe(self, losses, present):
        self.observed.append(present.tolist())

    def end_epoch(self, mean_losses):
        self.observed.append(mean_losses.tolist())


def test_attributes_of_a_loss_balancer_decide_which_calls_it_needs():
    rule = PresentObserver()
    adapted = adapt_loss_balancer(rule)
    assert (adapted.observes, adapted.needs_observation, adapted.needs_epochs, adapted.learns) == (True, False, True, False)
    adapted.observe(torch.ones(2), SOME)
    adapted.end_epoch(torch.ones(3))
    assert rule.observed == [[0, 2], [1, 1, 1]]
    plain = adapt_loss_balancer(lambda losses: losses)
    assert (plain.observes, plain.needs_observation, plain.needs_epochs, plain.learns) == (False, False, False, False)
    plain.observe(torch.ones(2), SOME)
    plain.end_epoch(torch.ones(3))
    assert adapt_loss_balancer(plain) is plain


@pytest.mark.parametrize("direction", [torch.ones(3), torch.ones(2, 1), torch.tensor([1.0, torch.nan]), [1.0, 2.0], None])
def test_a_direction_must_be_finite_and_have_the_shape_of_a_row(direction):
    rule = adapt_gradient_balancer(lambda jacobian: direction, "jacobian")
    with pytest.raises(ValueError, match=r"must return a finite direction \(2,\), but got"):
        rule(torch.ones(3, 2), Context.of_all(3))


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(2, 1), torch.tensor([1.0, torch.nan]), [1.0, 2.0], None])
def test_weights_must_be_finite_and_have_one_entry_for_each_task(weights):
    rule = adapt_gradient_balancer(lambda gramian: weights)
    with pytest.raises(ValueError, match="must return 2 finite weights, but got"):
        rule(torch.eye(2), Context.of_all(2))


def test_results_are_detached():
    leaf = torch.ones(2, requires_grad=True)
    assert not adapt_gradient_balancer(lambda gramian: 2 * leaf)(torch.eye(2), Context.of_all(2)).requires_grad
    direction = adapt_gradient_balancer(lambda jacobian: 2 * leaf, "jacobian")(torch.eye(2), Context.of_all(2))
    assert not direction.requires_grad


@pytest.mark.parametrize("sees", ["gramian", "jacobian"])
def test_losses_are_passed_only_to_a_rule_that_takes_them(sees):
    losses = torch.tensor([2.0, 3.0])

    def rule(data, *, losses=None):
        return torch.ones(2) if losses is None else losses

    adapted = adapt_gradient_balancer(rule, sees)
    assert adapted.uses_losses
    assert adapted(torch.eye(2), Context.of_all(2, losses)).tolist() == [2, 3]
    assert adapted(torch.eye(2), Context.of_all(2)).tolist() == [1, 1]
    other = adapt_gradient_balancer(lambda data: torch.ones(2), sees)
    assert not other.uses_losses
    assert other(torch.eye(2), Context.of_all(2, losses)).tolist() == [1, 1]


@pytest.mark.parametrize("sees", ["gramian", "jacobian"])
def test_traits_of_an_adapted_rule(sees):
    def rule(data):
        return torch.ones(2)

    adapted = adapt_gradient_balancer(rule, sees)
    assert (adapted.sees, adapted.heads, adapted.fixed_length, adapted.learns) == (sees, "unweighted", False, False)
    rule.heads, rule.fixed_length = "weighted", True
    adapted = adapt_gradient_balancer(rule, sees)
    assert (adapted.heads, adapted.fixed_length) == ("weighted", True)
    adapted = adapt_gradient_balancer(rule, sees, "unweighted", fixed_length=False)
    assert (adapted.heads, adapted.fixed_length) == ("unweighted", False)
    assert adapt_gradient_balancer(adapted) is adapted
    assert adapt_gradient_balancer(nn.Identity(), sees).learns


def test_takes_reads_the_keywords_of_a_function_and_of_a_module():
    class Module(nn.Module):
        def forward(self, losses, present=None):
            return losses

    assert takes(Module(), "present")
    assert not takes(Module(), "losses_of_others")
    assert takes(lambda losses, present: losses, "present")
    assert not takes(torch.sqrt, "present")


def test_an_error_of_a_task_names_it_where_the_name_is_available():
    def rule(losses):
        raise TaskError(1, "Loss of task {task} is wrong.")

    adapted = adapt_loss_balancer(rule)
    with pytest.raises(ValueError, match=r"^Loss of task 'c' is wrong\.$"):
        adapted(torch.ones(2), SOME)
    with pytest.raises(TaskError, match=r"^Loss of task '1' is wrong\.$"):
        adapted(torch.ones(2), Context.of_all(2))


def test_present_is_none_where_all_tasks_are_present():
    assert Context.of_all(3).present is None
    assert Context.of(None, 3).present is None
    assert Context.of(None, 3).indices.tolist() == [0, 1, 2]
    assert Context.of(torch.tensor([2]), 3).present.tolist() == [2]
    assert SOME.present.tolist() == [0, 2]


def test_traits_and_contexts_cannot_be_changed():
    for frozen, name in ((gradient_balancers.traits("mgda"), "label"), (SOME, "num_tasks")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, "other")


@pytest.mark.parametrize(
    ("sees", "options", "calls"),
    [("gramian", {}, 0), ("gramian", {"power": 2}, 1), ("jacobian", {}, 0), ("jacobian", {"power": 2}, 0)],
)
def test_a_rule_is_tried_out_only_if_it_has_options_and_sees_the_gramian(sees, options, calls, monkeypatch):
    called = []

    def rule(data, *, power: int = 1):
        called.append(data.tolist())
        return torch.ones(2, dtype=torch.float64)

    monkeypatch.setattr(gradient_balancers, "_methods", dict(gradient_balancers._methods))
    gradient_balancers.register("counted", sees=sees)(rule)
    Balancer(2, gradient="counted", gradient_options=options)
    assert called == [[[1, 0], [0, 1]]] * calls
