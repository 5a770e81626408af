import copy
import json
import math
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from balance import Balancer, Splitter, gradient_balancers
from balance.gradient.min_norm import mgda
from balance.gradient.projection import project_conflicts
from balance.rules.compose import every
from balance.splitter.per_sample import project_samples, shortest_between
from tests.strategies import SEEDS

TASKS = ("a", "b", "c")
RULES = gradient_balancers.names()
# every way to merge: what is normalised, projected, solved, drawn, kept
MODES = [
    {},
    {"projection": 1},
    {"projection": 3},
    {"gradient": None},
    {"gradient": None, "projection": 1},
    *({"gradient": name} for name in RULES),
    {"gradient": "every"},
]

ROTATABLE = [mode for mode in MODES if mode.get("gradient") != "graddrop"]  # that draws a number for each coordinate


def splitter_of(tasks, mode, **options):
    if mode.get("gradient") == "every":
        mode = {"gradient": every(2, "nashmtl", tasks if isinstance(tasks, int) else len(tasks))}
    return Splitter(tasks, **mode, **options)


def name_of(mode):
    return "-".join(str(value) for value in mode.values()) or "normalized"


modes = pytest.mark.parametrize("mode", MODES, ids=name_of)


class Network(nn.Module):
    """A trunk, a splitter, a head for each task; float64, so that what should be equal is."""

    def __init__(self, splitter=None, seed=0, tasks=TASKS):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in tasks})
        self.splitter = splitter
        self.double()

    def forward(self, x):
        views = self.splitter(self.trunk(x))
        return {task: head(views[task]) for task, head in self.heads.items()}

    def losses(self, x):
        return {t: (y - i).square().mean() * 10**i for i, (t, y) in enumerate(self(x).items())}

    def grads(self):
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def step(self, x, factor=1.0):
        """One step of gradient descent by one ordinary backward pass; the gradients."""
        self.zero_grad()
        (factor * sum(self.losses(x).values())).backward()
        with torch.no_grad():
            for p in self.parameters():
                p.sub_(p.grad, alpha=0.01)
        return self.grads()


def data(seed=1, batch=16):
    return torch.randn(batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merged(splitter, rows):
    """What goes on for task gradients; ``None`` for a task that is absent. Shapes like the features'."""
    rows = dict(zip(splitter.tasks, rows, strict=True))
    like = next(row for row in rows.values() if row is not None)
    x = torch.zeros_like(like, requires_grad=True)
    views = splitter(x)
    sum((views[task] * row).sum() for task, row in rows.items() if row is not None).backward()
    return x.grad


def gradients(seed, tasks, batch=4, size=3):
    return torch.randn(tasks, batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def tensors(state):
    """The tensors of a state_dict, nested ones too."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same_state(splitter, state):
    assert_same(tensors(splitter.state_dict()), tensors(state), rtol=0, atol=0, equal_nan=True)


# --- published numbers -----------------------------------------------------------------------------------------------

# What NormalizedMultiTaskSplitter of guillaumeBellec/multitask gives in float64: step t brings task a the gradient
# (t+1) [[1,2,0],[0,1,1]], zero in the first two steps of "zero_task_a_first", and task b [[-1,0,2],[3,0,-1]]
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))["splitter"]


@pytest.mark.parametrize("key", GOLDEN)
def test_golden(key):
    options = {"gradient": None if key.endswith("dummyTrue") else "normalized"}
    if key.startswith("variant"):
        options["projection"] = int(key[len("variant")])
    splitter = Splitter(("a", "b"), weights=(1, 3) if key == "weights_1_3" else None, **options)
    a = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[-1.0, 0.0, 2.0], [3.0, 0.0, -1.0]], dtype=torch.float64)
    for t, step in enumerate(GOLDEN[key]):
        factor = 0 if key == "zero_task_a_first" and t < 2 else t + 1
        torch.testing.assert_close(
            merged(splitter, [factor * a, b]), torch.tensor(step["g"], dtype=torch.float64), rtol=1e-13, atol=1e-14
        )
        assert splitter.squares.tolist() == pytest.approx(step["m"], rel=1e-14)
        assert splitter.counts.tolist() == step["t"]


# --- the same as the stage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_balancer_on_features(rule, weights):
    splitter = Splitter(TASKS, gradient=rule, weights=weights, seed=5)
    network, twin = Network(splitter), Network(lambda z: dict.fromkeys(TASKS, z))
    balancer = Balancer(TASKS, gradient=rule, source="features", heads="unweighted", seed=5)
    for t in range(3):
        x = data(t)
        network.zero_grad()
        sum(network.losses(x).values()).backward()
        twin.zero_grad()
        z = twin.trunk(x)
        views = dict.fromkeys(TASKS, z)
        losses = {k: (twin.heads[k](views[k]) - i).square().mean() * 10**i for i, k in enumerate(TASKS)}
        e = dict(zip(TASKS, weights or (1, 1, 1), strict=True))
        report = balancer.backward({k: e[k] * loss for k, loss in losses.items()}, shared=twin.trunk.parameters(), features=z)
        for task in TASKS:  # weights of the splitter are of the features' gradients, not of the heads'
            for p in twin.heads[task].parameters():
                p.grad /= e[task]
        assert_same(network.grads(), twin.grads(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(splitter.report.gramian, report.gramian)
        torch.testing.assert_close(splitter.report.cosines, report.cosines)
        if report.gradient_weights is not None:
            torch.testing.assert_close(splitter.report.gradient_weights, report.gradient_weights)


def test_report_says_what_was_done():
    splitter = Splitter(TASKS, weights={"a": 1, "b": 2, "c": 1})
    assert splitter.report is None
    J = gradients(0, 3)
    direction = merged(splitter, [J[0], None, J[2]])
    report = splitter.report
    assert report.tasks == ("a", "c")
    assert report.loss_weights.tolist() == [0.25, 0.25]
    weights = report.loss_weights * report.gradient_weights
    torch.testing.assert_close(torch.einsum("k,kbf->bf", weights, J[[0, 2]]), direction)
    assert report.losses.isnan().all()
    assert report.gramian is None


def test_report_of_a_projection_has_no_weights_of_the_batch():
    splitter = Splitter(2, projection=1)
    J = gradients(0, 2)
    merged(splitter, J)
    assert splitter.report.gradient_weights is None
    flat = J.flatten(1) / 2
    torch.testing.assert_close(splitter.report.gramian, flat @ flat.T)


# --- the normalisation -----------------------------------------------------------------------------------------------

FACTORS = st.lists(st.floats(-6, 6), min_size=3, max_size=3)


@given(seed=SEEDS, exponents=FACTORS, projection=st.sampled_from([0, 1, 3]))
def test_a_constant_factor_on_a_loss_is_cancelled(seed, exponents, projection):
    plain, scaled = Splitter(3, projection=projection), Splitter(3, projection=projection)
    for t in range(3):
        J = gradients(seed + t, 3)
        factors = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
        torch.testing.assert_close(merged(scaled, J * factors[:, None, None]), merged(plain, J), rtol=1e-9, atol=1e-12)


@given(seed=SEEDS, weights=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
def test_at_the_first_step_every_gradient_gets_its_weight_as_length(seed, weights):
    J = gradients(seed, len(weights))
    splitter = Splitter(len(weights), weights=weights)
    units = J / J.square().sum(dim=2).mean(dim=1).sqrt()[:, None, None]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(merged(splitter, J), torch.einsum("k,kbf->bf", shares, units))


@given(seed=SEEDS, tasks=st.integers(1, 5), batch=st.integers(1, 4), size=st.integers(1, 4))
def test_samples_are_projected_as_pcgrad_projects_gradients(seed, tasks, batch, size):
    J = gradients(seed, tasks, batch, size).transpose(0, 1)
    C = J @ J.transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [[j for j in torch.randperm(tasks, generator=generator).tolist() if j != i] for i in range(tasks)]
    orders = torch.tensor(orders, dtype=torch.int64).reshape(tasks, tasks - 1)
    found = project_samples(C, orders)
    for sample, coefficients in zip(C, found, strict=True):
        expected = torch.from_numpy(project_conflicts(sample.numpy(), orders.numpy()))
        torch.testing.assert_close(coefficients.sum(dim=0), expected, rtol=1e-8, atol=1e-8)
    if tasks == 2:
        left = found @ J
        assert ((left @ J.transpose(1, 2)).flatten() > -1e-9 * C.abs().max()).all()


@given(seed=SEEDS, batch=st.integers(1, 4), size=st.integers(1, 4))
def test_shortest_is_mgda_of_every_sample(seed, batch, size):
    J = gradients(seed, 2, batch, size)
    splitter = Splitter(2, gradient=None, projection=2)
    expected = torch.stack([mgda(rows @ rows.T) @ rows for rows in J.transpose(0, 1) / 2])
    torch.testing.assert_close(merged(splitter, J), expected, rtol=1e-8, atol=1e-10)
    assert shortest_between(torch.ones(1, 2, 2, dtype=torch.float64)).sum() == 1  # equal gradients


def test_samples_of_images_are_flattened():
    J = gradients(3, 2, 4, 12)
    for projection in ("none", "after_norm", "shortest", "before_norm"):
        flat = merged(Splitter(2, projection=projection), J)
        image = merged(Splitter(2, projection=projection), J.view(2, 4, 3, 2, 2))
        torch.testing.assert_close(image.flatten(1), flat)


def test_random_orders_are_drawn_anew():
    J = gradients(0, 4, 8, 3)
    splitter = Splitter(4, gradient=None, projection=1)
    found = [merged(splitter, J) for _ in range(6)]
    assert any((found[0] != other).any() for other in found[1:])
    torch.testing.assert_close(merged(Splitter(4, gradient=None, projection=1), J), found[0], rtol=0, atol=0)


# --- anywhere in a network -------------------------------------------------------------------------------------------


def test_several_splitters_one_below_the_other():
    """Rules with constant weights are linear, so the result is known: at every place what the splitters above have made."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(2))
    outer = Splitter(("a", "rest"), gradient=lambda G: torch.tensor([2.0, 3.0]).to(G))
    inner = Splitter(("b", "c"), gradient=lambda G: torch.tensor([5.0, 7.0]).to(G))
    x = torch.randn(6, 4, dtype=torch.float64)

    def losses(split):
        views = outer(first(x)) if split else dict.fromkeys(("a", "rest"), first(x))
        deep = second(views["rest"])
        below = inner(deep) if split else dict.fromkeys(("b", "c"), deep)
        return views["a"].square().mean(), below["b"].exp().mean(), below["c"].sin().mean()

    sum(losses(split=True)).backward()
    a, b, c = losses(split=False)
    expected = torch.autograd.grad(2 * a + 3 * (5 * b + 7 * c), list(first.parameters()))
    expected += torch.autograd.grad(5 * losses(split=False)[1] + 7 * losses(split=False)[2], list(second.parameters()))
    for p, gradient in zip([*first.parameters(), *second.parameters()], expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_one_splitter_used_twice_in_a_forward_pass_counts_both():
    splitter = Splitter(2)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    sum((view * (k + 1)).sum() for _ in range(2) for k, view in enumerate(splitter(x).values())).backward()
    assert splitter.counts.tolist() == [2, 2]


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "pack", [tuple, list, lambda p: Pair(*p), lambda p: {"left": p[0], "right": [p[1]]}], ids=["tuple", "list", "named", "dict"]
)
@pytest.mark.parametrize("mode", ROTATABLE, ids=name_of)
def test_several_feature_tensors_are_balanced_as_one(mode, pack):
    J = gradients(2, 3, 4, 10)
    whole = merged(splitter_of(TASKS, mode), J)
    pieces = [torch.zeros(4, 3, 2, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)]
    for piece in pieces:
        piece.requires_grad_()
    views = splitter_of(TASKS, mode)(pack(pieces))
    total = 0
    for task, rows in zip(TASKS, J, strict=True):
        left, right = views[task].values() if isinstance(views[task], dict) else views[task]
        right = right[0] if isinstance(right, list) else right
        total = total + (left.flatten(1) * rows[:, :6]).sum() + (right * rows[:, 6:]).sum()
    total.backward()
    assert type(views["a"]) is type(pack(pieces))
    torch.testing.assert_close(torch.cat([pieces[0].grad.flatten(1), pieces[1].grad], dim=1), whole)


def test_a_tensor_given_twice_is_one_and_one_without_gradient_is_handed_through():
    J = gradients(4, 2)
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 3)
    views = Splitter(2)((x, mask, x))
    assert views["0"][1] is mask
    sum((views[str(k)][0] * J[k] / 2 + views[str(k)][2] * J[k] / 2).sum() for k in range(2)).backward()
    torch.testing.assert_close(x.grad, merged(Splitter(2), J))


def test_a_feature_that_no_task_reaches_gets_no_gradient():
    x, y = (torch.zeros(4, 3, requires_grad=True) for _ in range(2))
    views = Splitter(2, gradient="mgda")([x, y])
    (views["0"][0].sum() + views["1"][0].sum()).backward()
    assert x.grad is not None
    assert y.grad is None


def test_a_view_may_be_used_twice():
    J = gradients(5, 2)
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    views = Splitter(2, gradient="imtl")(x)
    (sum((views["0"] * J[0] / 2).sum() for _ in range(2)) + (views["1"] * J[1]).sum()).backward()
    torch.testing.assert_close(x.grad, merged(Splitter(2, gradient="imtl"), J))


def test_views_cannot_be_changed_in_place():
    """They share their memory: a ReLU in place of one task would change what the others see."""
    views = Splitter(2)(torch.randn(3, 2, requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="inplace"):
        nn.functional.relu(views["0"], inplace=True)


def test_below_a_checkpoint():
    x = data()
    network, twin = Network(Splitter(TASKS)), Network(Splitter(TASKS))
    sum(network.losses(x).values()).backward()
    checkpoint(lambda: sum(twin.losses(x).values()), use_reentrant=False).backward()
    assert_same(twin.grads(), network.grads(), rtol=0, atol=0)
    assert twin.splitter.counts.tolist() == [1, 1, 1]


@modes
@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (0, 3)], ids=str)
def test_any_shape_of_features(mode, shape):
    J = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = merged(splitter_of(TASKS, mode), J)
    assert direction.shape == shape
    assert direction.isfinite().all()


def test_one_dimension_is_a_sample_of_one_number():
    torch.testing.assert_close(
        merged(Splitter(2), gradients(1, 2, 4, 1)[:, :, 0]), merged(Splitter(2), gradients(1, 2, 4, 1))[:, 0]
    )


@modes
def test_one_task(mode):
    g = gradients(0, 1)
    direction = merged(splitter_of(1, mode), g)
    norm = g[0].square().sum(dim=1).mean().sqrt()
    factor = {"normalized": 1 / norm, "cagrad": (1 + 0.4) / (1 + 0.4**2), "nashmtl": 1 / g.norm(), "every": 1 / g.norm()}
    torch.testing.assert_close(direction, g[0] * factor.get(mode.get("gradient", "normalized"), 1.0))


@modes
def test_zero_gradients(mode):
    splitter = splitter_of(TASKS, mode)
    assert not merged(splitter, torch.zeros(3, 4, 3)).any()
    assert splitter.counts.tolist() == [0, 0, 0]


def test_evaluation_and_no_grad_give_the_features_themselves():
    splitter = Splitter(TASKS)
    x = torch.randn(3, 2, requires_grad=True)
    with torch.no_grad():
        assert all(view is x for view in splitter(x).values())
    assert splitter(x.detach())["a"].requires_grad is False
    splitter.eval()
    views = splitter([x])
    assert views["b"][0] is x
    sum(view[0].sum() for view in views.values()).backward()
    assert (x.grad == 3).all()


# --- which tasks, and when state moves -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, None, "normalized"])
def test_an_absent_task_is_a_smaller_problem(rule):
    """The normalisation alone keeps dividing by the weights of all tasks."""
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


# --- failures --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A rule that moves its state, and then does what it is told."""

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


# --- precision -------------------------------------------------------------------------------------------------------


class Learned(nn.Module):
    """A rule with a parameter, a float32 buffer and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device="cpu"))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3], device="cpu"))
        self.register_buffer("steps", torch.tensor(2, device="cpu"))

    def forward(self, gramian):
        return self.logits


CASTS = {
    "half": (lambda module: module.half(), torch.float16),
    "double and float": (lambda module: module.double().float(), torch.float32),
    "to": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "to_empty": (lambda module: module.to_empty(device="cpu"), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_casts_change_parameters_and_no_state(cast, dtype):
    splitter = Splitter(TASKS, gradient=Learned(), weights=(1, 2, 3))
    splitter.gradient_balancer.rule.logits.grad = torch.ones(3)
    before = {name: buffer.clone() for name, buffer in splitter.named_buffers()}
    cast(nn.ModuleList([splitter]))
    for name, buffer in splitter.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name
    assert splitter.gradient_balancer.rule.logits.dtype == splitter.gradient_balancer.rule.logits.grad.dtype == dtype
    assert splitter.gradient_balancer.rule.logits.tolist() == [1, 2, 3]
    assert splitter.gradient_balancer.rule.logits.grad.tolist() == [1, 1, 1]


@modes
def test_state_has_its_values_on_any_default_device(mode):
    with torch.device("meta"):
        network = nn.ModuleDict({"trunk": nn.Linear(2, 2), "splitter": splitter_of(TASKS, mode)})
    J = gradients(0, 3)
    torch.testing.assert_close(merged(network.to_empty(device="cpu")["splitter"], J), merged(splitter_of(TASKS, mode), J))


def test_state_moves_with_the_module():
    splitter = Splitter(TASKS).to("meta")
    assert {buffer.device.type for buffer in splitter.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in splitter.to_empty(device="cpu").buffers()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("mode", ROTATABLE, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_squares_of_half_precision_do_not_underflow(mode, dtype):
    J = (gradients(0, 3) * 1e-3).to(dtype)
    direction = merged(splitter_of(TASKS, mode), J)
    assert direction.dtype == dtype
    expected = merged(splitter_of(TASKS, mode), J.double())
    torch.testing.assert_close(direction.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("size", [1e-28, 1e28])
def test_squares_beyond_float32(size):
    J = gradients(0, 3).float()
    torch.testing.assert_close(merged(Splitter(TASKS), J * size), merged(Splitter(TASKS), J))


def test_features_of_different_dtypes():
    x, y = (
        torch.zeros(4, 2, dtype=torch.float16, requires_grad=True),
        torch.zeros(4, 3, dtype=torch.float64, requires_grad=True),
    )
    J = gradients(0, 2, 4, 5).half().double()
    views = Splitter(2, gradient="mgda")((x, y))
    sum((views[str(k)][0] * J[k, :, :2].half()).sum() + (views[str(k)][1] * J[k, :, 2:]).sum() for k in range(2)).backward()
    expected = merged(Splitter(2, gradient="mgda"), J)
    assert x.grad.dtype == torch.float16
    torch.testing.assert_close(y.grad, expected[:, 2:])
    torch.testing.assert_close(x.grad, expected[:, :2].half())


@pytest.mark.parametrize("mode", [{}, {"projection": 1}, {"gradient": "mgda"}], ids=name_of)
def test_autocast(mode):
    network = Network(splitter_of(TASKS, mode)).float()
    twin = copy.deepcopy(network)
    x = data().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = network.trunk(x)
        z.retain_grad()
        views = network.splitter(z)
        losses = {t: (h(views[t]).float() - i).square().mean() * 10**i for i, (t, h) in enumerate(network.heads.items())}
    assert z.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as some training loops have it
        sum(losses.values()).backward()
    assert z.grad.dtype == torch.bfloat16
    sum(twin.losses(x).values()).backward()
    for name, expected in twin.grads().items():
        found = network.grads()[name]
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 0.05 * expected.norm() + 1e-6, name


@modes
def test_autocast_around_backward_changes_nothing(mode):
    J = gradients(0, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merged(splitter_of(TASKS, mode), J)
    torch.testing.assert_close(found, merged(splitter_of(TASKS, mode), J), rtol=0, atol=0)


@modes
def test_grad_scaler(mode):
    """Scaled, balanced and unscaled, the step is the one without a scaler, also when the scale changes."""
    network, twin = (Network(splitter_of(TASKS, mode)).float() for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    network.splitter.scaler, twin.splitter.scaler = scaler, torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (network, twin)]
    for t in range(3):
        x = data(t).float()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(sum(network.losses(x).values())).backward()
        scaler.step(optimizers[0])
        scaler.update()
        sum(twin.losses(x).values()).backward()
        optimizers[1].step()
    assert scaler.get_scale() == 2.0**11
    assert_same(dict(network.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-6)


def test_without_the_scaler_the_normalisation_undoes_the_scale():
    """Why ``scaler=`` is needed: the trunk would learn as if its gradients were divided by the scale."""
    J = gradients(0, 2)
    torch.testing.assert_close(merged(Splitter(2), J * 1024), merged(Splitter(2), J))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@modes
def test_what_is_not_finite_leaves_no_trace_and_is_passed_on(mode, value):
    network = Network(splitter_of(TASKS, mode))
    network.step(data(0))
    state = copy.deepcopy(network.splitter.state_dict())
    network.zero_grad()
    losses = network.losses(data(1))
    (losses["a"] + losses["b"] * value + losses["c"]).backward()
    assert_same_state(network.splitter, state)
    assert all(p.grad.isnan().all() for p in network.trunk[2].parameters())
    assert network.heads["a"].weight.grad.isfinite().all()


def test_a_grad_scaler_skips_what_is_not_finite():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    network = Network(Splitter(TASKS, gradient="pcgrad", scaler=scaler))
    optimizer = torch.optim.SGD(network.trunk.parameters(), lr=0.1)
    before = copy.deepcopy(network.trunk.state_dict())
    scaler.scale(sum(network.losses(data()).values()) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same(dict(network.trunk.state_dict()), dict(before), rtol=0, atol=0)


# --- rules of one's own, and bad input -------------------------------------------------------------------------------


def test_any_callable_and_wrapped_rules():
    J = gradients(0, 3)
    torch.testing.assert_close(merged(Splitter(TASKS, gradient=lambda G: torch.arange(3.0)), J), J[1] + 2 * J[2])
    splitter = Splitter(TASKS, gradient=every(2, "mgda", num_tasks=3))
    first = merged(splitter, J)
    torch.testing.assert_close(first, merged(Splitter(TASKS, gradient="mgda"), J))
    other = gradients(1, 3)
    weights = splitter.report.gradient_weights
    torch.testing.assert_close(merged(splitter, other), torch.einsum("k,kbf->bf", weights, other))  # kept


@pytest.mark.parametrize(
    ("splitter", "text"),
    [
        (lambda: Splitter(("a", "b")), "Splitter(('a', 'b'), gradient=normalized)"),
        (
            lambda: Splitter(("a", "b"), gradient="cagrad", gradient_options={"c": 0.9}, weights={"a": 1, "b": 5}),
            "Splitter(('a', 'b'), gradient=cagrad(c=0.9), weights={'a': 1.0, 'b': 5.0})",
        ),
        (
            lambda: Splitter(("a",), gradient=None, projection=1, beta=0.5),
            "Splitter(('a',), gradient=None, projection='after_norm', beta=0.5)",
        ),
        (
            lambda: Splitter(("a",), gradient=every(2, "mgda", num_tasks=1)),
            "Splitter(('a',), gradient=every(2, mgda))",
        ),
    ],
)
def test_repr(splitter, text):
    assert repr(splitter()) == text
    assert f"(0): {text}" in repr(nn.ModuleList([splitter()]))


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional argument"):
        Splitter(TASKS, "cagrad", {"c": 0.9})


def test_the_seed_reaches_rules_within_rules():
    J = gradients(0, 3)
    for seed in (0, 1):
        rule = every(1, "pcgrad", num_tasks=3)
        torch.testing.assert_close(
            merged(Splitter(TASKS, gradient=rule, seed=seed), J), merged(Splitter(TASKS, gradient="pcgrad", seed=seed), J)
        )


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "all distinct, but got", {"tasks": ("a", "a")}),
        (TypeError, "names or their number", {"tasks": "ab"}),
        (ValueError, "Did you mean 'mgda'", {"gradient": "mdga"}),
        (ValueError, "Did you mean 'normalized'", {"gradient": "normalised"}),
        (TypeError, "registered name or a callable", {"gradient": 3}),
        (ValueError, "Options are for registered names", {"gradient": torch.diagonal, "gradient_options": {"c": 1}}),
        (ValueError, "need a gradient balancer", {"gradient_options": {"c": 1}}),
        (ValueError, "has no option", {"gradient": "cagrad", "gradient_options": {"d": 1}}),
        (ValueError, "must not be negative", {"gradient": "cagrad", "gradient_options": {"c": -1.0}}),
        (ValueError, "sees no losses", {"gradient": "mgda", "gradient_options": {"normalization": "loss"}}),
        (ValueError, "sees no losses", {"gradient": lambda G, losses: losses}),
        (ValueError, "not negative", {"weights": (1, -1, 1)}),
        (ValueError, "not all zero", {"weights": (0, 0, 0)}),
        (ValueError, "finite", {"weights": (1, math.nan, 0)}),
        (ValueError, "for each of 3 tasks", {"weights": (1, 2)}),
        (ValueError, "none for b, c", {"weights": {"a": 1}}),
        (ValueError, "Unknown task in weights", {"weights": {"a": 1, "b": 1, "d": 1}}),
        (ValueError, "projection must be one of 'none', ", {"projection": 4}),
        (ValueError, "projection='shortest' is for two tasks, but got 3", {"projection": 2}),
        (ValueError, "projection='after_norm' is for gradient='normalized'", {"projection": 1, "gradient": "pcgrad"}),
        (ValueError, r"beta must be in 0..1", {"beta": 1.0}),
        (TypeError, "beta must be float", {"beta": "0.9"}),
        (TypeError, "must be a GradScaler", {"scaler": 65536.0}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        Splitter(**{"tasks": TASKS} | arguments)


@pytest.mark.parametrize(
    ("error", "message", "features"),
    [
        (TypeError, "must be floats, but got torch.int64", torch.arange(3)),
        (TypeError, "must be floats, but got torch.complex64", [torch.zeros(2, dtype=torch.complex64)]),
        (TypeError, "but got str", {"a": "b"}),
        (TypeError, "but got NoneType", None),
        (ValueError, "at least one tensor", ()),
        (ValueError, r"sizes \[2, 3\]", [torch.zeros(2, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)]),
    ],
)
def test_bad_features(error, message, features):
    with pytest.raises(error, match=message):
        Splitter(TASKS)(features)


def test_a_rule_needs_no_samples():
    x, y = (torch.zeros(n, 1, requires_grad=True) for n in (2, 3))
    views = Splitter(2, gradient="mgda")([x, y])
    sum(v.sum() * (k + 1) for k, view in enumerate(views.values()) for v in view).backward()
    assert (x.grad == 1).all()
    assert (y.grad == 1).all()


@pytest.mark.parametrize("found", [torch.ones(2), torch.full((3,), math.nan), 1.0], ids=str)
def test_bad_weights_of_a_callable(found):
    with pytest.raises(ValueError, match="must return 3 finite weights"):
        merged(Splitter(TASKS, gradient=lambda G: found), gradients(0, 3))


# --- many processes --------------------------------------------------------------------------------------------------

DISTRIBUTED = [{}, {"projection": 3}, {"projection": 1, "weights": (1, 2, 3)}, {"gradient": "pcgrad"}, {"gradient": "nashmtl"}]


def train(network, model, batches):
    """Three steps; the weights of the first."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    weights = None
    for x in batches:
        optimizer.zero_grad()
        sum((y - i).square().mean() * 10**i for i, y in enumerate(model(x).values())).backward()
        optimizer.step()
        weights = network.splitter.report.gradient_weights if weights is None else weights
    return {"weights": weights, "state": network.state_dict()}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = []
    for mode in DISTRIBUTED:
        network = Network(splitter_of(TASKS, mode))
        half = slice(8 * rank, 8 * rank + 8)
        results.append(train(network, DistributedDataParallel(network), [data(t)[half] for t in range(3)]))
    try:
        merged(Splitter(2, gradient="graddrop"), gradients(0, 2))
    except RuntimeError as error:
        results.append(str(error))
    # a task that one rank alone has seen is present everywhere
    J = gradients(rank, 2)
    results.append((merged(Splitter(2, gradient="mgda"), [J[0], J[1] if rank else None]), J))
    # what is not finite on one rank stops all
    splitter = Splitter(2)
    results.append((merged(splitter, J * (math.inf if rank else 1)), splitter.counts))
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for mode, first, second in zip(DISTRIBUTED, *ranks, strict=False):
        network = Network(splitter_of(TASKS, mode))
        alone = train(network, network, [data(t) for t in range(3)])
        assert_same(tensors(first["state"]), tensors(alone["state"]), rtol=1e-9, atol=1e-12)
        assert_same(tensors(first["state"]), tensors(second["state"]), rtol=0, atol=0)
        if first["weights"] is not None:
            assert first["weights"].tolist() == second["weights"].tolist()
            torch.testing.assert_close(first["weights"], alone["weights"])
    refusal, (left, J), (direction, counts) = ranks[0][-3:]
    assert "torch.distributed runs 2" in refusal
    assert direction.isnan().all()
    assert counts.tolist() == [0, 0]
    right, Q = ranks[1][-2]
    whole = torch.cat([torch.stack([J[0], torch.zeros_like(J[0])]), Q], dim=1) / 2  # each rank's loss counts half
    torch.testing.assert_close(torch.cat([left, right]) / 2, merged(Splitter(2, gradient="mgda"), whole))
