import json
import re

import pytest
import torch
from torch import nn

import balance
from balance.diagnosis import diagnose as diagnosis
from balance.diagnosis.statistics import Pair
from balance.profiling import Cost

FEW = {"loss_methods": (), "gradient_methods": ()}
RULES = {"loss_methods": ("scaleinvls", "famo", "uw"), "gradient_methods": ("mgda", "imtl", "pcgrad", "cagrad")}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """One timed step of each method."""
    monkeypatch.setattr(diagnosis, "_ROUNDS", 1)
    monkeypatch.setattr(diagnosis, "_REPEATS", 1)


class Quadratics(nn.Module):
    """Half the squared distances of the parameters from a target for each task, times the batch, which is a number.

    Gradients at the start, where the parameters are zero: minus the targets, times the batch.
    """

    def __init__(self, **targets):
        super().__init__()
        self.targets = {task: torch.tensor(target, dtype=torch.float64) for task, target in targets.items()}
        size = len(next(iter(self.targets.values())))
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def losses(self, batch):
        return {task: batch * (self.theta - target).square().sum() / 2 for task, target in self.targets.items()}


def diagnose(model, batches=(1.0, 2.0, 3.0), **options):
    return balance.diagnose(model.losses, batches, model=model, shared=model.parameters(), **{**FEW, **options})


class Linear(nn.Module):
    """Losses that are linear in the parameters: ``constant + slope @ theta`` with a slope by task and batch."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def losses(self, batch):
        return {task: constant + slope @ self.theta for task, (constant, slope) in batch.items()}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_that_are_known():
    found = diagnose(Quadratics(a=[2.0, 0, 0], b=[-3.0, 4, 0], c=[0.0, 0, 1]), lr=0.1, steps=1)
    assert found.tasks == ("a", "b", "c")
    assert (found.parameters, found.batches, found.steps, found.lr) == (3, 3, 1, 0.1)
    numbers = found.as_dict()["start"]
    assert numbers["loss_median"] == pytest.approx({"a": 4, "b": 25, "c": 1})
    assert numbers["loss_min"] == pytest.approx({"a": 2, "b": 12.5, "c": 0.5})
    assert numbers["loss_max"] == pytest.approx({"a": 6, "b": 37.5, "c": 1.5})
    assert numbers["loss_ratio"] == pytest.approx(25)
    assert numbers["gradient_norm"] == pytest.approx({"a": 4, "b": 10, "c": 2})
    assert numbers["gradient_norm_ratio"] == pytest.approx(5)
    assert numbers["relative_gradient_norm"] == pytest.approx({"a": 1, "b": 0.4, "c": 2})
    assert numbers["relative_gradient_norm_ratio"] == pytest.approx(5)
    # the sum of the targets is (-1, 4, 1), of squared length 18
    assert numbers["share_of_sum"] == pytest.approx({"a": -2 / 18, "b": 19 / 18, "c": 1 / 18})
    assert numbers["conflict_share"] == pytest.approx(1 / 3)
    (ab, ac, bc) = found.start.pairs
    assert (ab.tasks, ac.tasks, bc.tasks) == (("a", "b"), ("a", "c"), ("b", "c"))
    assert (ab.mean, ac.mean, bc.mean) == pytest.approx((-0.6, 0, 0))
    assert (ab.spread, ac.spread, bc.spread) == pytest.approx((0, 0, 0), abs=1e-9)
    assert (ab.reading, ac.reading, bc.reading) == ("conflict", "orthogonal", "orthogonal")


def test_the_second_look_is_after_training_by_adam_on_the_plain_sum():
    targets = {"a": [2.0, 0, 0], "b": [-3.0, 4, 0]}
    found = diagnose(Quadratics(**targets), lr=0.3, steps=5)
    model = Quadratics(**targets)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for batch in (1.0, 2.0, 3.0, 1.0, 2.0):
        optimizer.zero_grad()
        sum(model.losses(batch).values()).backward()
        optimizer.step()
    gradients = torch.stack([model.theta - target for target in model.targets.values()]).detach()
    assert found.end.norms[1] == pytest.approx(2 * gradients.norm(dim=1))
    assert found.end.losses[0] == pytest.approx(gradients.square().sum(dim=1) / 2)
    assert found.end.pairs[0].mean == pytest.approx(torch.cosine_similarity(*gradients, dim=0))
    assert abs(found.end.pairs[0].mean - found.start.pairs[0].mean) > 0.1


def test_spread_over_batches():
    slopes = [([1.0, 0], [0.6, 0.8]), ([1.0, 0], [-0.8, 0.6])]
    batches = [{"a": (1.0, torch.tensor(a).double()), "b": (1.0, torch.tensor(b).double())} for a, b in slopes]
    (pair,) = diagnose(Linear(2), batches, steps=1).start.pairs
    assert pair.mean == pytest.approx(-0.1)
    assert pair.spread == pytest.approx(1.4 / 2**0.5)
    assert pair.reading == "noise"


@pytest.mark.parametrize(
    ("mean", "spread", "reading"),
    [
        (-0.5, 0.2, "conflict"),
        (0.5, 0.2, "agreement"),
        (-0.5, 0.4, "noise"),
        (0.5, 0.4, "noise"),
        (-0.04, 0.01, "orthogonal"),
        (0.0, 0.06, "noise"),
        (-0.06, 0.01, "conflict"),
    ],
)
def test_reading(mean, spread, reading):
    assert Pair(("a", "b"), mean, spread).reading == reading


def test_only_so_many_batches_are_taken():
    taken = []

    def batches():
        for k in range(100):
            taken.append(k)
            yield 1.0 + k

    assert diagnose(Quadratics(a=[1.0], b=[2.0]), batches(), num_batches=4, steps=1).batches == 4
    assert taken == [0, 1, 2, 3]


# --- prices -----------------------------------------------------------------------------------------------------------


def test_every_registered_method_is_priced():
    found = diagnose(Quadratics(a=[2.0, 0, 0], b=[-3.0, 4, 0]), loss_methods=None, gradient_methods=None)
    assert set(found.loss_prices) == {*balance.loss_balancers.names()} - {"ls"}
    assert set(found.gradient_prices) == {*balance.gradient_balancers.names()}
    for price in (*found.loss_prices.values(), *found.gradient_prices.values()):
        assert price.reason == ""
        assert price.time == pytest.approx(price.cost.seconds / found.baseline.seconds)
        assert price.memory == pytest.approx(price.cost.bytes / found.baseline.bytes)


def test_memory_of_a_gradient_balancer_is_that_of_the_jacobian():
    size = 100_000
    model = Quadratics(a=[1.0] * size, b=[-1.0] * size, c=[2.0] * size)
    found = diagnose(model, gradient_methods=("mgda",), steps=1)
    extra = found.gradient_prices["mgda"].cost.bytes - found.baseline.bytes
    assert 2 * size * 8 <= extra <= 3.3 * size * 8  # three gradients; an ordinary step holds one at its peak, too


class Meter:
    """Stands for `measure`: one call of each step, and costs in turn."""

    def __init__(self, *seconds):
        self.seconds = iter(seconds)
        self.calls = 0
        self.devices = []

    def __call__(self, step, *, device, **_):
        step()
        self.devices.append(device)
        return Cost(next(self.seconds, 1.0), 100)


def test_the_observation_belongs_to_the_price(monkeypatch):
    calls = []
    model = Quadratics(a=[1.0], b=[2.0])

    def losses(batch):
        calls.append(batch)
        return model.losses(batch)

    def count(*methods):
        calls.clear()
        monkeypatch.setattr(diagnosis, "measure", Meter())
        options = {"loss_methods": methods, "gradient_methods": (), "steps": 1}
        balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], **options)
        return len(calls)

    assert (count("uw") - count(), count("famo") - count()) == (1, 2)


def test_a_step_begins_without_gradients(monkeypatch):
    model = Quadratics(a=[1.0], b=[2.0])
    left = []

    def meter(step, **_):
        step()
        left.append(model.theta.grad)
        return Cost(1.0, 1)

    monkeypatch.setattr(diagnosis, "measure", meter)
    diagnose(model, **RULES)
    assert left == [None] * 8


def test_the_quickest_of_several_rounds_counts(monkeypatch):
    monkeypatch.setattr(diagnosis, "_ROUNDS", 2)
    monkeypatch.setattr(diagnosis, "measure", Meter(0.02, 0.09, 0.03, 0.05))  # plain, uw, plain, uw
    found = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert (found.baseline.seconds, found.loss_prices["uw"].time) == (0.02, pytest.approx(2.5))


def test_slow_steps_are_measured_in_one_round(monkeypatch):
    monkeypatch.setattr(diagnosis, "_ROUNDS", 2)
    monkeypatch.setattr(diagnosis, "measure", Meter(2.0, 9.0, 1.0, 1.0))
    found = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert found.loss_prices["uw"].time == 4.5


def test_a_long_round_is_the_last(monkeypatch):
    monkeypatch.setattr(diagnosis, "_ROUNDS", 2)
    monkeypatch.setattr(diagnosis, "_SECONDS", 0)
    monkeypatch.setattr(diagnosis, "measure", Meter(0.02, 0.09, 0.01, 0.01))
    found = diagnose(Quadratics(a=[1.0], b=[2.0]), loss_methods=("uw",))
    assert found.loss_prices["uw"].time == pytest.approx(4.5)


def test_losses_that_are_not_positive():
    model = Linear(2)
    batches = [{"a": (1.0, torch.tensor([1.0, 0]).double()), "b": (0.1, torch.tensor([0, 99.0]).double())}] * 2
    found = diagnose(model, batches, lr=0.1, **RULES)
    assert (found.start.losses > 0).all()  # they fall below zero in training
    assert (found.end.losses < 0).all()
    assert (found.end.relative_norms > 0).all()
    assert "Loss of task 'a' is -" in found.loss_prices["scaleinvls"].reason
    assert found.loss_prices["famo"].cost is None
    assert found.loss_prices["uw"].cost is not None
    assert "scaleinvls does not run: Loss of task" in str(found)
    assert "scaleinvls" not in found.loss_methods


def test_a_method_that_fails_gives_its_reason(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))

    @balance.gradient_balancers.register("broken")
    def broken(gramian):
        raise RuntimeError("no memory left\nat all")

    @balance.gradient_balancers.register("choosy")
    def choosy(gramian, *, taste):
        return gramian.diagonal() * taste

    found = diagnose(Quadratics(a=[1.0], b=[2.0]), gradient_methods=("broken", "choosy", "mgda"))
    assert found.gradient_prices["broken"][0] is None
    assert found.gradient_prices["broken"].reason == "no memory left"
    assert "needs its option 'taste'" in found.gradient_prices["choosy"].reason
    assert found.gradient_prices["mgda"].cost is not None
    assert found.as_dict()["gradient_prices"]["broken"] == {
        "cost": None,
        "time": None,
        "memory": None,
        "reason": "no memory left",
    }


# --- advice -----------------------------------------------------------------------------------------------------------


def advice(found):
    return " ".join(found.recommendation)


class Scaled(Quadratics):
    """A thousand times the losses of the last task."""

    def losses(self, batch):
        losses = super().losses(batch)
        last = list(losses)[-1]
        return losses | {last: 1000 * losses[last]}


def test_losses_of_different_scale():
    found = diagnose(Scaled(small=[0.0, 1], large=[1.0, 0]), lr=1e-4, **RULES)
    assert found.as_dict()["start"]["loss_ratio"] == pytest.approx(1000)
    assert found.loss_methods == ("scaleinvls", "famo", "uw")
    assert found.gradient_methods == ()  # divided by their losses, the gradients are equal
    assert re.search(r"The gradient of 'large' is 99\d times as long as that of 'small'", advice(found))
    assert "With equal weights the shared parameters follow 'large' alone" in advice(found)
    assert "the gradients differ by a factor of 1: compare scaleinvls, famo, uw (" in advice(found)


def test_what_a_loss_balancer_leaves_unequal():
    found = diagnose(Scaled(small=[0.0, 1], large=[5.0, 0]), lr=1e-4, **RULES)
    assert found.loss_methods == ("scaleinvls", "famo", "uw")
    assert found.gradient_methods == ("mgda", "imtl")
    assert re.search(r"Even divided by its loss, the gradient of 'small' is (5|4\.99) times that of 'large'", advice(found))
    assert "compare mgda, imtl" in advice(found)


def test_large_losses_with_gradients_of_one_length():
    batches = [{"a": (1000.0, torch.tensor([1.0, 0]).double()), "b": (1.0, torch.tensor([0, 1.0]).double())}] * 2
    found = diagnose(Linear(2), batches, **RULES)
    assert (found.loss_methods, found.gradient_methods) == ((), ())
    assert "The losses differ more, but it is their gradients that count" in advice(found)


def test_gradients_that_no_division_by_the_loss_levels():
    batches = [{"a": (100.0, torch.tensor([1.0, 0]).double()), "b": (10.0, torch.tensor([0, 50.0]).double())}] * 2
    found = diagnose(Linear(2), batches, steps=1, **RULES)
    assert found.loss_methods == ()
    assert found.gradient_methods == ("mgda", "imtl")
    assert "Dividing by the losses does not help" in advice(found)


@pytest.mark.parametrize("b", [[2.0, 0.0], [0.0, 1.0]], ids=["aligned", "orthogonal"])
def test_without_conflict_there_is_nothing_to_pay_for(b):
    found = diagnose(Quadratics(a=[1.0, 0], b=b), lr=1e-4, **RULES)
    assert (found.loss_methods, found.gradient_methods) == ((), ())
    assert "There is no conflict" in advice(found)
    assert "Do not pay for a rule that repairs it" in advice(found)
    assert "Scale is no reason for a loss balancer" in advice(found)


def test_opposed_tasks(monkeypatch):
    monkeypatch.setattr(diagnosis, "measure", Meter(*[1.0] * 4, 1.5, 1.5, 2.0, 1.6))  # plain, 3 by loss, 4 by gradient
    found = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0], c=[-2.0, 1]), **RULES)
    assert found.loss_methods == ()
    assert found.gradient_methods == ("pcgrad", "cagrad")
    assert "'a' and 'b' conflict at nearly every batch (cosine -1.00 ± 0.00), as does one more pair" in advice(found)
    assert "compare pcgrad, cagrad (2.0, 1.6 times the time of a plain step)" in advice(found)
    assert "compose.every" in advice(found)


def test_cheap_gradient_balancers_need_no_excuse(monkeypatch):
    monkeypatch.setattr(diagnosis, "measure", Meter())
    found = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0]), **RULES)
    assert found.gradient_methods == ("pcgrad", "cagrad")
    assert "compose.every" not in advice(found)


def test_conflict_that_is_noise():
    generator = torch.Generator().manual_seed(0)

    def slope():
        return torch.randn(10, generator=generator, dtype=torch.float64)

    batches = [{task: (100.0, slope()) for task in ("a", "b", "c")} for _ in range(16)]
    found = diagnose(Linear(10), batches, **RULES)
    assert {pair.reading for pair in found.end.pairs} == {"noise"}
    assert 0.3 < found.end.conflict_share < 0.7
    assert (found.loss_methods, found.gradient_methods) == ((), ())
    assert "Conflict is noise" in advice(found)


class Passing(nn.Module):
    """The second task pulls against the first until the parameter is beyond one half."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def losses(self, batch):
        return {"a": 10 - batch * self.theta, "b": 10 - batch * (self.theta - 0.5).abs() / 2}


def test_conflict_that_passes():
    found = diagnose(Passing(), lr=0.1, **RULES)
    assert [look.pairs[0].reading for look in (found.start, found.end)] == ["conflict", "agreement"]
    assert "There is no conflict" in advice(found)
    assert "'a' and 'b' conflict at the start only" in advice(found)
    assert found.gradient_methods == ()


def test_what_was_not_priced_is_not_suggested():
    found = diagnose(Quadratics(a=[1.0, 0], b=[-1.0, 0]))
    assert found.gradient_methods == ()
    assert "such as pcgrad, cagrad could help, but none of them was priced or runs here" in advice(found)


def test_a_task_without_a_gradient():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    head = nn.Parameter(torch.ones(()).double())
    found = balance.diagnose(
        lambda batch: model.losses(batch) | {"alone": head.square()}, [1.0, 2.0], model=model, shared=[model.theta], **FEW
    )
    assert "The gradient of 'alone' is zero on the shared parameters" in advice(found)
    assert found.as_dict()["end"]["gradient_norm_ratio"] < 1.5
    assert "Task gradients are of similar length: the longest, of " in advice(found)
    assert head.grad is None


def test_it_says_that_it_is_a_guess():
    assert "Only a comparison of finished runs over several seeds" in diagnose(Quadratics(a=[1.0], b=[2.0])).recommendation[-1]


# --- the model is left as it was --------------------------------------------------------------------------------------


class Untidy(nn.Module):
    """Batch norm, dropout, a frozen layer, a part in evaluation mode, gradients of an earlier step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
        self.trunk[0].weight.requires_grad_(False)
        self.trunk[5].eval()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("nothing", None)
        for k, parameter in enumerate(self.parameters()):
            if parameter.requires_grad and k % 2:
                parameter.grad = torch.randn_like(parameter)

    def losses(self, batch):
        self.steps = self.steps + 1
        features = self.trunk(batch)
        return {task: (head(features) - 1).square().mean() for task, head in self.heads.items()}


def state(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    gradients = [(name, p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return [(name, t, t.detach().clone()) for name, t in tensors], gradients, flags, torch.get_rng_state()


def assert_same(before, after):
    (tensors, gradients, flags, rng), (tensors_after, gradients_after, flags_after, rng_after) = before, after
    for (name, tensor, value), (_, tensor_after, value_after) in zip(tensors, tensors_after, strict=True):
        assert tensor is tensor_after, name
        assert torch.equal(value, value_after), name
    for (name, gradient, value), (_, gradient_after, value_after) in zip(gradients, gradients_after, strict=True):
        assert gradient is gradient_after, name
        assert value is value_after is None or torch.equal(value, value_after), name
    assert flags == flags_after
    assert torch.equal(rng, rng_after)


def batches_of_four(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_model_is_left_as_it_was(mode):
    model = Untidy()
    before = state(model)
    with mode():
        found = balance.diagnose(
            model.losses,
            batches_of_four(),
            model=model,
            shared=model.trunk.parameters(),
            lr=0.1,
            loss_methods=("famo", "rlw"),
            gradient_methods=("mgda", "graddrop"),
        )
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert_same(before, state(model))
    assert not torch.equal(found.start.losses, found.end.losses)
    assert found.parameters == 8 + 2 * 8 + 8 * 8 + 8 + 2 * 8  # but for the frozen weight


@pytest.mark.parametrize("call", [1, 3, 6, 10, 14])  # names, first look, training, second look, prices
def test_the_model_is_left_as_it_was_after_an_exception(call):
    model = Untidy()
    before = state(model)
    calls = []

    def losses(batch):
        calls.append(batch)
        if len(calls) == call:
            model.eval()
            raise KeyError("mine")
        return model.losses(batch)

    with pytest.raises(KeyError, match="mine"):
        balance.diagnose(losses, batches_of_four(), model=model, shared=model.trunk.parameters(), steps=4, **FEW)
    assert len(calls) == call
    assert_same(before, state(model))


def test_modes_and_flags_that_losses_change_are_put_back():
    model = Untidy()
    before = state(model)

    def losses(batch):
        model.train()
        model.trunk[0].weight.requires_grad_(True)
        return model.losses(batch)

    balance.diagnose(losses, batches_of_four(), model=model, shared=model.trunk.parameters(), steps=2, **FEW)
    assert_same(before, state(model))


def test_a_gradient_of_what_is_reached_in_training_only():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    model.extra = nn.Parameter(torch.ones(()).double())
    model.extra.grad = gradient = torch.tensor(7.0).double()
    calls = []

    def losses(batch):
        calls.append(batch)
        factor = model.extra if len(calls) == 5 else 1.0  # names, two batches, then training
        return {task: factor * loss for task, loss in model.losses(batch).items()}

    balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], steps=4, **FEW)
    assert model.extra.grad is gradient
    assert gradient == 7
    assert model.extra == 1


def test_gradients_outside_the_model_are_left_as_they_were():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    noise, offset = nn.Parameter(torch.ones(()).double()), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    noise.grad = gradient = torch.tensor(7.0).double()

    def losses(batch):
        return {task: noise * loss + (batch * offset).sum() + offset.sum() for task, loss in model.losses(1.0).items()}

    balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], loss_methods=("uw",), gradient_methods=("mgda",))
    assert noise.grad is gradient
    assert gradient == 7
    assert offset.grad is None
    assert noise == 1


def test_same_state_same_numbers():
    model = Untidy()

    def look():
        torch.manual_seed(3)
        found = balance.diagnose(model.losses, batches_of_four(), model=model, shared=model.trunk.parameters(), **FEW)
        return found.as_dict()["start"], found.as_dict()["end"]

    assert look() == look()


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 9])
def test_the_report_is_not_too_wide(num_tasks):
    targets = {f"a_task_with_quite_a_long_name_{k}": [float(k + 1), (-1.0) ** k, 1e5 * k] for k in range(num_tasks)}
    found = diagnose(Quadratics(**targets), loss_methods=None, gradient_methods=None)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    for heading in ("LOSS", "GRADIENT LENGTH", "COSINE", "COST OF A STEP", "What to compare, and why"):
        assert any(line.startswith(heading) for line in lines)
    assert ("(21 more, less negative)" in str(found)) == (num_tasks == 9)


def test_columns_of_the_report_are_aligned():
    lines = str(diagnose(Quadratics(a=[2.0, 0], reconstruction=[-300.0, 4]), loss_methods=("uw",))).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("LOSS"))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    assert table[2].split() == ["a", "4", "2", "6", *table[2].split()[4:]]


def test_everything_fits_into_json():
    model = Quadratics(a=[0.0, 0], b=[0.0, 1])  # the loss and the gradient of a are zero at the start
    found = diagnose(model, loss_methods=("scaleinvls",), gradient_methods=("mgda",), steps=1)
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["tasks"] == ["a", "b"]
    assert numbers["start"]["relative_gradient_norm"]["a"] is None
    assert numbers["loss_prices"]["scaleinvls"]["reason"].startswith("Loss of task 'a' is 0")
    assert numbers["gradient_prices"]["mgda"]["time"] > 0
    assert numbers["recommendation"] == list(found.recommendation)
    assert set(numbers) == set(found.__dataclass_fields__)


# --- mistakes ---------------------------------------------------------------------------------------------------------


QUADRATICS = Quadratics(a=[1.0], b=[2.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches must hold at least two, .* but got 0. Is it an iterator that was used up?"),
        ({"batches": [1.0]}, ValueError, "batches must hold at least two, .* but got 1"),
        ({"batches": 3}, TypeError, "batches must be an iterable of batches, but got int"),
        ({"losses": {"a": 1}}, TypeError, "losses must be a callable, .* but got dict"),
        ({"losses": lambda batch: QUADRATICS.theta * batch}, TypeError, "losses must return a dict .* but got Tensor"),
        ({"losses": lambda batch: {"a": QUADRATICS.theta}}, ValueError, r"at least two tasks, but got \['a'\]"),
        ({"losses": lambda batch: {"a": 1.0, "b": QUADRATICS.theta}}, TypeError, "Loss of task 'a' must be a tensor"),
        ({"losses": lambda batch: {"a": torch.ones(2), "b": QUADRATICS.theta}}, ValueError, "must be a scalar"),
        (
            {"losses": lambda batch: {"a": QUADRATICS.theta, "b": QUADRATICS.theta} if batch < 2 else {"b": QUADRATICS.theta}},
            ValueError,
            "for batch 1 'a' are missing",
        ),
        ({"losses": lambda batch: {"a": QUADRATICS.theta / 0, "b": QUADRATICS.theta}}, ValueError, "Losses must be finite"),
        ({"model": QUADRATICS.theta}, TypeError, "model must be an nn.Module, but got Parameter"),
        ({"shared": []}, ValueError, "shared must hold parameters, but is empty"),
        ({"shared": QUADRATICS}, TypeError, "shared must be an iterable of parameters"),
        ({"shared": [torch.zeros(2)]}, ValueError, "requires a gradient, but all are frozen"),
        ({"loss_methods": ("uww",)}, ValueError, "Unknown loss balancer 'uww'. Did you mean 'uw'?"),
        ({"gradient_methods": ("mdga",)}, ValueError, "Unknown gradient balancer 'mdga'. Did you mean 'mgda'?"),
        ({"gradient_methods": "mgda"}, TypeError, r"several names, but got 'mgda'. Use \('mgda',\)"),
        ({"steps": 0}, ValueError, "steps must be an int, at least 1, but got 0"),
        ({"num_batches": 1}, ValueError, "num_batches must be an int, at least 2, but got 1"),
        ({"lr": 0.0}, ValueError, "lr must be positive, but got 0.0"),
    ],
)
def test_mistakes(change, error, message):
    arguments = {"losses": QUADRATICS.losses, "batches": [1.0, 2.0], "model": QUADRATICS, "shared": [QUADRATICS.theta], **FEW}
    arguments |= change
    with pytest.raises(error, match=message):
        balance.diagnose(arguments.pop("losses"), arguments.pop("batches"), **arguments)
    assert QUADRATICS.theta.tolist() == [0]
    assert QUADRATICS.theta.grad is None
