import pytest
import torch
from torch import nn

import balance
from balance.diagnosis import measurement
from balance.profiling import Cost
from tests.diagnosis.problems import Linear, Meter, Quadratics, diagnose

RULES = {"loss_methods": ("scaleinvls", "famo", "uw"), "gradient_methods": ("mgda", "imtl", "pcgrad", "cagrad")}


def test_second_statistics_are_after_training_by_adam_on_the_plain_sum():
    targets = {"a": [2.0, 0, 0], "b": [-3.0, 4, 0]}
    diagnosis = diagnose(Quadratics(**targets), lr=0.3, steps=5)
    model = Quadratics(**targets)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for batch in (1.0, 2.0, 3.0, 1.0, 2.0):
        optimizer.zero_grad()
        sum(model.losses(batch).values()).backward()
        optimizer.step()
    gradients = torch.stack([model.theta - target for target in model.targets.values()]).detach()
    assert diagnosis.end.norms[1] == pytest.approx(2 * gradients.norm(dim=1))
    assert diagnosis.end.losses[0] == pytest.approx(gradients.square().sum(dim=1) / 2)
    assert diagnosis.end.pairs[0].mean == pytest.approx(torch.cosine_similarity(*gradients, dim=0))
    assert abs(diagnosis.end.pairs[0].mean - diagnosis.start.pairs[0].mean) > 0.1


def test_only_so_many_batches_are_taken():
    taken = []

    def batches():
        for k in range(100):
            taken.append(k)
            yield 1.0 + k

    assert diagnose(Quadratics(a=[1.0], b=[2.0]), batches(), num_batches=4, steps=1).batches == 4
    assert taken == [0, 1, 2, 3]


def test_every_registered_method_is_priced():
    diagnosis = diagnose(Quadratics(a=[2.0, 0, 0], b=[-3.0, 4, 0]), loss_methods=None, gradient_methods=None)
    assert set(diagnosis.loss_prices) == {*balance.loss_balancers.names()} - {"ls"}
    assert set(diagnosis.gradient_prices) == {*balance.gradient_balancers.names()}
    for price in (*diagnosis.loss_prices.values(), *diagnosis.gradient_prices.values()):
        assert price.reason == ""
        assert price.time == pytest.approx(price.cost.seconds / diagnosis.baseline.seconds)
        assert price.memory == pytest.approx(price.cost.bytes / diagnosis.baseline.bytes)


def test_memory_of_a_gradient_balancer_is_that_of_the_jacobian():
    size = 100_000
    model = Quadratics(a=[1.0] * size, b=[-1.0] * size, c=[2.0] * size)
    diagnosis = diagnose(model, gradient_methods=("mgda",), steps=1)
    extra = diagnosis.gradient_prices["mgda"].cost.bytes - diagnosis.baseline.bytes
    assert 2 * size * 8 <= extra <= 3.3 * size * 8  # three gradients; an ordinary step has one at its peak, too


def test_observation_belongs_to_the_price(monkeypatch):
    calls = []
    model = Quadratics(a=[1.0], b=[2.0])

    def losses(batch):
        calls.append(batch)
        return model.losses(batch)

    def count(*methods):
        calls.clear()
        monkeypatch.setattr(measurement, "measure_cost", Meter())
        options = {"loss_methods": methods, "gradient_methods": (), "steps": 1}
        balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], **options)
        return len(calls)

    assert (count("uw") - count(), count("famo") - count()) == (1, 2)


def test_step_begins_without_gradients(monkeypatch):
    model = Quadratics(a=[1.0], b=[2.0])
    left = []

    def meter(step, **_):
        step()
        left.append(model.theta.grad)
        return Cost(1.0, 1)

    monkeypatch.setattr(measurement, "measure_cost", meter)
    diagnose(model, **RULES)
    assert left == [None] * 8


def test_quickest_of_several_rounds_counts(monkeypatch):
    monkeypatch.setattr(measurement, "ROUNDS", 2)
    monkeypatch.setattr(measurement, "measure_cost", Meter(0.02, 0.09, 0.03, 0.05))  # plain, uw, plain, uw
    diagnosis = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert (diagnosis.baseline.seconds, diagnosis.loss_prices["uw"].time) == (0.02, pytest.approx(2.5))


def test_slow_steps_are_measured_in_one_round(monkeypatch):
    monkeypatch.setattr(measurement, "ROUNDS", 2)
    monkeypatch.setattr(measurement, "measure_cost", Meter(2.0, 9.0, 1.0, 1.0))
    diagnosis = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert diagnosis.loss_prices["uw"].time == 4.5


def test_long_round_is_the_last(monkeypatch):
    monkeypatch.setattr(measurement, "ROUNDS", 2)
    monkeypatch.setattr(measurement, "SECONDS", 0)
    monkeypatch.setattr(measurement, "measure_cost", Meter(0.02, 0.09, 0.01, 0.01))
    diagnosis = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert diagnosis.loss_prices["uw"].time == pytest.approx(4.5)


def test_losses_that_are_not_positive():
    batches = [{"a": (1.0, torch.tensor([1.0, 0]).double()), "b": (0.1, torch.tensor([0, 99.0]).double())}] * 2
    diagnosis = diagnose(Linear(2), batches, lr=0.1, **RULES)
    assert (diagnosis.start.losses > 0).all()  # they fall below zero in training
    assert (diagnosis.end.losses < 0).all()
    assert (diagnosis.end.relative_norms > 0).all()
    assert "Loss of task 'a' is -" in diagnosis.loss_prices["scaleinvls"].reason
    assert diagnosis.loss_prices["famo"].cost is None
    assert diagnosis.loss_prices["uw"].cost is not None
    assert "scaleinvls does not run: Loss of task" in str(diagnosis)
    assert "scaleinvls" not in diagnosis.loss_methods


def test_method_that_fails_gives_its_reason(registries):
    @balance.gradient_balancers.register("broken", remedies=["conflict"])
    def broken(gramian):
        raise RuntimeError("no memory left\nat all")

    @balance.gradient_balancers.register("choosy", remedies=["conflict"])
    def choosy(gramian, *, taste):
        return gramian.diagonal() * taste

    diagnosis = diagnose(Quadratics(a=[1.0], b=[-2.0]), gradient_methods=("broken", "choosy", "mgda"))
    assert diagnosis.gradient_prices["broken"][0] is None
    assert diagnosis.gradient_prices["broken"].reason == "no memory left"
    assert "needs its option 'taste'" in diagnosis.gradient_prices["choosy"].reason
    assert diagnosis.gradient_prices["mgda"].cost is not None
    assert not {"broken", "choosy"}.intersection(diagnosis.gradient_methods)
    assert diagnosis.as_dict()["gradient_prices"]["broken"] == {
        "cost": None,
        "time": None,
        "memory": None,
        "reason": "no memory left",
    }


class OneConstantTask(nn.Module):
    """The loss of the second task depends on the parameters, but its gradient is zero."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2))

    def losses(self, batch):
        return {"a": batch * self.theta.square().sum(), "b": 1 + 0 * self.theta.sum()}


def test_method_that_stops_the_shared_parameters_gives_its_reason():
    """MGDA gives all weight to the gradient that is zero."""
    diagnosis = diagnose(OneConstantTask(), gradient_methods=("mgda", "pcgrad"))
    price = diagnosis.gradient_prices["mgda"]
    assert price.cost is not None
    assert price.reason == "its direction is zero at every batch, so that the shared parameters are not trained"
    assert not price.usable
    assert "mgda is no choice: its direction is zero" in str(diagnosis)
    assert diagnosis.gradient_prices["pcgrad"].usable
    assert "mgda" not in diagnosis.gradient_methods


def test_jacobian_rule_that_stops_the_shared_parameters_gives_its_reason(registries):
    balance.gradient_balancers.register("nothing", sees="jacobian")(lambda jacobian: 0 * jacobian[0])
    assert not diagnose(Quadratics(a=[1.0], b=[2.0]), gradient_methods=("nothing",)).gradient_prices["nothing"].usable


def test_method_is_not_blamed_where_equal_weights_stop_too():
    diagnosis = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0]), lr=1e-4, gradient_methods=("mgda", "pcgrad"))
    assert diagnosis.gradient_prices["pcgrad"].usable
    assert diagnosis.gradient_prices["mgda"].usable
