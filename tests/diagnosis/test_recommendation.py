import pytest
import torch
from torch import nn

import balance
from balance.diagnosis import measurement
from balance.diagnosis.recommendation import CONDITIONS, recommend
from balance.rules.registry import Registry
from balance.types import Need, Remedy
from tests.diagnosis.conftest import ones
from tests.diagnosis.problems import Linear, Meter, Quadratics, Scaled, diagnose, text

ALL = {"loss_methods": None, "gradient_methods": None}
# For each remedy a problem that calls for it: model, options
SITUATIONS = {
    "loss scale": (lambda: Scaled(small=[0.0, 1], large=[1.0, 0]), {"lr": 1e-4}),
    "gradient length": (lambda: Scaled(small=[0.0, 1], large=[5.0, 0]), {"lr": 1e-4}),
    "domination": (lambda: Quadratics(short=[0.0, 1], long=[5.0, 0]), {"lr": 1e-4}),
    "conflict": (lambda: Quadratics(a=[1.0, 0.5], b=[-1.0, 0.5]), {}),
    "training pace": (lambda: Quadratics(near=[1.0], far=[10.0]), {"lr": 0.1, "steps": 5}),
    "local minima": (lambda: Quadratics(a=[1.0, 0.1], b=[-1.0, 0.1]), {"lr": 1e-4}),
}
REGISTRIES = {"loss": balance.loss_balancers, "gradient": balance.gradient_balancers}
REMEDIES = [
    (kind, name, remedy)
    for kind, registry in REGISTRIES.items()
    for name in registry.names()
    for remedy in registry.traits(name).remedies
]


def test_every_remedy_has_a_situation_and_every_need_a_condition():
    assert set(SITUATIONS) == set(Remedy.__args__)
    assert set(CONDITIONS) == set(Need.__args__)


@pytest.mark.parametrize(("kind", "name", "remedy"), REMEDIES, ids=[f"{name} for {remedy}" for _, name, remedy in REMEDIES])
def test_every_registered_method_is_recommended_where_its_remedy_is_called_for(kind, name, remedy):
    model, options = SITUATIONS[remedy]
    diagnosis = diagnose(model(), **options, **{f"{kind}_methods": (name,)})
    assert name in getattr(diagnosis, f"{kind}_methods")
    assert name in text(diagnosis)


@pytest.mark.parametrize("remedy", SITUATIONS)
def test_rule_registered_by_others_is_recommended(remedy, one_rule_per_remedy):
    model, options = SITUATIONS[remedy]
    diagnosis = diagnose(model(), **options, **ALL)
    name = remedy.replace(" ", "_")
    assert f"loss_{name}" in diagnosis.loss_methods
    assert f"gradient_{name}" in diagnosis.gradient_methods
    assert f"loss balancer loss_{name} (" in text(diagnosis)


def test_nothing_is_recommended_where_nothing_calls_for_it(one_rule_per_remedy):
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[0.0, 1]), lr=1e-4, **ALL)
    assert (diagnosis.loss_methods, diagnosis.gradient_methods) == ((), ())
    assert "Nothing here calls for a balancer: begin with equal weights." in text(diagnosis)
    assert "Do not pay for a rule only because it repairs conflict (loss_conflict, gradient_conflict)." in text(diagnosis)


def test_gradients_that_division_by_the_losses_levels_need_no_gradient_balancer(one_rule_per_remedy):
    diagnosis = diagnose(Scaled(small=[0.0, 1], large=[1.0, 0]), lr=1e-4, **ALL)
    assert diagnosis.loss_methods == ("loss_loss_scale", "loss_domination")
    assert diagnosis.gradient_methods == ("gradient_loss_scale", "gradient_domination")
    assert "Divided by their losses, the gradients differ by a factor of 1: compare loss balancer loss_loss_scale (" in text(
        diagnosis
    )


def test_cheapest_methods_come_first_and_the_others_are_counted(one_rule_per_remedy, monkeypatch):
    for name in "edcba":
        balance.gradient_balancers.register(name, remedies=["conflict"])(ones)
    monkeypatch.setattr(measurement, "measure_cost", Meter(1.0, 1.5, 1.42, 1.44, 1.3, 1.6))  # plain, then by name
    names = tuple("abcde")
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-2.0, 1]), gradient_methods=names)
    assert diagnosis.gradient_methods == ("d", "b", "c")  # b and c cost the same in the printed digits
    expected = "compare gradient balancers d, b, c (1.3, 1.4, 1.4 times the time of a plain step; 2 more could help)."
    assert expected in text(diagnosis)


def test_methods_that_address_more_problems_come_first(one_rule_per_remedy, monkeypatch):
    for name in ("one", "two", "three"):
        balance.gradient_balancers.register(name, remedies=["conflict"])(ones)
    balance.gradient_balancers.register("both", remedies=["domination", "conflict"])(ones)
    names = ("one", "two", "three", "both")
    monkeypatch.setattr(measurement, "measure_cost", Meter(1.0, 1.1, 1.1, 1.1, 9.0))
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0], c=[-2.0, 1]), gradient_methods=names)
    assert diagnosis.gradient_methods == ("both", "one", "three")


def test_unpriced_methods_are_not_recommended(one_rule_per_remedy):
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0]))
    assert diagnosis.gradient_methods == ()
    expected = "methods such as loss_conflict, gradient_conflict could help, but none of them was priced and trains here"
    assert expected in text(diagnosis)


def test_problem_that_no_method_addresses(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", {})
    monkeypatch.setattr(balance.loss_balancers, "_methods", {"ls": balance.loss_balancers._methods["ls"]})
    assert "): no registered method addresses that." in text(diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0])))


def test_methods_that_need_positive_losses_are_left_out_where_losses_are_negative(registries):
    @balance.loss_balancers.register("positive", remedies=["conflict"], needs=["positive losses"])
    def positive(losses):
        return losses

    batches = [{"a": (-5.0, torch.tensor([1.0, 0]).double()), "b": (5.0, torch.tensor([-1.0, 0.1]).double())}] * 2
    diagnosis = diagnose(Linear(2), batches, loss_methods=("positive",))
    assert diagnosis.loss_prices["positive"].usable
    assert diagnosis.loss_methods == ()
    assert "The loss of 'a' is not always positive, as positive need: give lower bounds" in text(diagnosis)


def test_conditions_of_recommended_methods_are_named(registries):
    @balance.loss_balancers.register("epochs", remedies=["conflict"], needs=["end_epoch", "all tasks"])
    def epochs(losses):
        return losses

    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0.2]), loss_methods=("epochs",))
    assert "Conditions of these methods: epochs (end_epoch() once per epoch, all tasks at every step)." in text(diagnosis)


def test_gradient_balancer_that_ignores_loss_weights_goes_without_loss_balancer(registries):
    balance.gradient_balancers.register("ignorant", remedies=["conflict"], ignores_weights=True)(ones)
    balance.loss_balancers.register("weights", remedies=["conflict"])(lambda losses: 2 * losses)
    model = Quadratics(a=[1.0, 0], b=[-1.0, 0.2])
    both = diagnose(model, loss_methods=("weights",), gradient_methods=("ignorant",))
    assert "Compare ignorant without a loss balancer only" in text(both)
    assert "without a loss balancer only" not in text(diagnose(model, gradient_methods=("ignorant",)))


@pytest.mark.parametrize(("seconds", "expensive"), [((1.0, 1.5, 2.0), "gradient_conflict"), ((1.0, 1.5, 1.0), None)])
def test_expensive_methods_come_with_ways_to_pay_less(one_rule_per_remedy, monkeypatch, seconds, expensive):
    monkeypatch.setattr(measurement, "measure_cost", Meter(*seconds))
    names = ("gradient_domination", "gradient_conflict")
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0], c=[-2.0, 1]), gradient_methods=names)
    advice = f'gradient=compose.every(10, "{expensive}", num_tasks=3)'
    assert (advice in text(diagnosis)) == (expensive is not None)
    assert ("compose.every" in text(diagnosis)) == (expensive is not None)


def test_expensive_rule_that_sees_the_jacobian_has_no_weights_to_reuse(registries, monkeypatch):
    balance.gradient_balancers.register("by_entry", sees="jacobian", remedies=["conflict"])(lambda J: J.sum(dim=0))
    monkeypatch.setattr(measurement, "measure_cost", Meter(1.0, 3.0))
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0.2]), gradient_methods=("by_entry",))
    assert 'for by_entry, measure at the features in place of the parameters, source="features".' in text(diagnosis)
    assert "compose.every" not in text(diagnosis)


def test_entry_point_that_cannot_be_imported_is_left_out():
    class Broken(Registry):
        def names(self):
            return ("broken", "fine")

        def traits(self, name):
            if name == "broken":
                raise ModuleNotFoundError("No module named 'missing'")
            return super().traits(name)

    registry = Broken("gradient balancer", "none")
    registry.register("fine", remedies=["conflict"])(ones)
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0.2]))
    recommendation = recommend(diagnosis.start, diagnosis.end, (registry,) * 2, ({}, {}))
    assert "methods such as fine, fine could help" in " ".join(recommendation.sentences)


def test_task_without_a_gradient():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    head = nn.Parameter(torch.ones(()).double())
    diagnosis = balance.diagnose(
        lambda batch: model.losses(batch) | {"alone": head.square()},
        [1.0, 2.0],
        model=model,
        shared=[model.theta],
        loss_methods=(),
        gradient_methods=(),
    )
    assert "The gradient of 'alone' is zero on the shared parameters" in text(diagnosis)
    assert diagnosis.as_dict()["end"]["gradient_norm_ratio"] < 1.5
    assert "Task gradients are of similar length: the longest, of " in text(diagnosis)
    assert head.grad is None


def test_recommendation_says_that_it_is_a_guess():
    assert "Only a comparison of finished runs over several seeds" in diagnose(Quadratics(a=[1.0], b=[2.0])).recommendation[-1]
