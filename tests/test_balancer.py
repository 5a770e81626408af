import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import balance
from balance import Balancer
from tests.strategies import SEEDS

TASKS = ("a", "b", "c")


class Network(nn.Module):
    def __init__(self, seed=0, tasks=TASKS):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in tasks})
        self.x = torch.randn(16, 5)

    def losses(self, features=None):
        features = self.trunk(self.x) if features is None else features
        return {t: (h(features) - i).square().mean() * 10**i for i, (t, h) in enumerate(self.heads.items())}

    def shared(self):
        return self.trunk.parameters()

    def grads(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}


def assert_same(a, b, **tolerances):
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert (a[name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(a[name], expected, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def reference(network, weights, head_weights):
    """Gradients by one ordinary backward per task: shared by ``weights``, heads by ``head_weights``."""
    twin = copy.deepcopy(network)
    for task, w, h in zip(network.heads, weights, head_weights, strict=True):
        trunk, head = list(twin.trunk.parameters()), list(twin.heads[task].parameters())
        gradients = torch.autograd.grad(twin.losses()[task], [*trunk, *head])
        for p, g, factor in zip([*trunk, *head], gradients, [w] * len(trunk) + [h] * len(head), strict=True):
            p.grad = factor * g if p.grad is None else p.grad + factor * g
    return twin.grads()


# --- plain backward --------------------------------------------------------------------------------------------------


@given(seed=SEEDS, as_tensor=st.booleans())
def test_ls_alone_is_the_ordinary_backward_bit_for_bit(seed, as_tensor):
    network = Network(seed)
    twin = copy.deepcopy(network)
    torch.stack(list(twin.losses().values())).sum().backward()
    losses = network.losses()
    report = Balancer(TASKS).backward(torch.stack(list(losses.values())) if as_tensor else losses)
    assert_same(network.grads(), twin.grads(), rtol=0, atol=0)
    assert report.gramian is None
    assert report.loss_weights.tolist() == [1, 1, 1]


def test_without_gradient_balancer_autograd_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a second backward pass"))
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: calls.append(1) or backward(self, *a, **k))
    Balancer(TASKS, loss="uw").backward(Network().losses())
    assert calls == [1]


# --- composition -----------------------------------------------------------------------------------------------------


ON_GRAMIANS = [name for name in balance.gradient_balancers.names() if balance.gradient_balancers.sees(name) == "gramian"]


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("heads", [None, "weighted", "unweighted"])
@pytest.mark.parametrize("gradient", ON_GRAMIANS)
@pytest.mark.parametrize("loss", ["ls", "scaleinvls", "go4align", "uw"])
def test_gradients_are_those_of_the_weighted_losses(loss, gradient, heads, as_tensor):
    network = Network()
    losses = network.losses()
    balancer = Balancer(TASKS, loss=loss, gradient=gradient, heads=heads)
    report = balancer.backward(torch.stack(list(losses.values())) if as_tensor else losses, shared=network.shared())
    twin = copy.deepcopy(network)
    rows = [torch.autograd.grad(loss, list(twin.trunk.parameters()), retain_graph=True) for loss in twin.losses().values()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double() * report.loss_weights.double()[:, None]
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-5, atol=1e-12)
    weights = balance.gradient_balancers.build(gradient, num_tasks=3)(report.gramian).float()
    torch.testing.assert_close(report.gradient_weights, weights)
    official = "weighted" if gradient in ("mgda", "imtl", "nashmtl") else "unweighted"
    head_weights = weights if (heads or official) == "weighted" else torch.ones(3)
    expected = reference(network, weights * report.loss_weights, head_weights * report.loss_weights)
    assert_same(network.grads(), expected, rtol=1e-4, atol=1e-4)


def test_a_loss_rule_that_mixes_tasks_is_exact():
    """A custom rule whose outputs depend on several losses: autograd of the weighted losses is the reference."""
    mix = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]])
    network = Network()
    report = Balancer(TASKS, loss=lambda L: mix @ L.log(), gradient=lambda G: torch.tensor([1.0, 2.0, 3.0])).backward(
        network.losses(), shared=network.shared()
    )
    twin = Network()
    weighted = mix @ torch.stack(list(twin.losses().values())).log()
    rows = [torch.autograd.grad(w, list(twin.trunk.parameters()), retain_graph=True) for w in weighted]
    for p, *gs in zip(network.trunk.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, gs[0] + 2 * gs[1] + 3 * gs[2], rtol=1e-4, atol=1e-6)
    heads = torch.autograd.grad(weighted.sum(), list(twin.heads.parameters()))
    for p, g in zip(network.heads.parameters(), heads, strict=True):
        torch.testing.assert_close(p.grad, g)
    torch.testing.assert_close(report.weighted_losses, weighted.detach())


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_parameters_of_the_balancer_get_the_plain_sum(gradient):
    network = Network()
    balancer = Balancer(TASKS, loss="uw", gradient=gradient)
    losses = network.losses()
    balancer.backward(losses, shared=network.shared())
    plain = 0.5 * (1 - torch.stack(list(losses.values())).detach())
    torch.testing.assert_close(torch.stack([s.grad for s in balancer.loss_balancer.rule.log_variances]), plain)


@pytest.mark.parametrize(("scale", "gradient"), [("sum", "mgda"), ("norm", "mgda"), ("sum", "pcgrad"), ("norm", "pcgrad")])
def test_scale(scale, gradient):
    network = Network()
    report = Balancer(TASKS, gradient=gradient, scale=scale).backward(network.losses(), shared=network.shared())
    paper = balance.gradient_balancers.build(gradient)(report.gramian)
    weights = report.gradient_weights.double()
    torch.testing.assert_close(weights / weights.norm(), paper / paper.norm(), rtol=1e-6, atol=1e-7)
    if scale == "sum":
        assert weights.sum().item() == pytest.approx(3, rel=1e-6)
    else:
        direction = torch.cat([p.grad.flatten() for p in network.shared()]).double()
        assert direction.norm().item() == pytest.approx(report.gramian.sum().sqrt().item(), rel=1e-5)


def test_norm_scale_leaves_a_stationary_point_alone():
    theta = torch.zeros(2, requires_grad=True)
    losses = {"a": theta[0] + 0 * theta[1], "b": -theta[0] + 0 * theta[1]}
    Balancer(("a", "b"), gradient="mgda", scale="norm").backward(losses, shared=[theta])
    assert theta.grad.abs().max() < 1e-6


# --- accumulation, frozen and unreached parameters -------------------------------------------------------------------


@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_grad_is_added_to(gradient, source):
    def step(network, times):
        balancer = Balancer(TASKS, loss="uw", gradient=gradient, source=source, gradient_options={})
        for _ in range(times):
            features = network.trunk(network.x)
            torch.manual_seed(0)
            balancer.backward(network.losses(features), shared=network.shared(), features=features)
            if gradient == "pcgrad":
                balancer.gradient_balancer.rule.random.__init__(1)  # the same order again
        return network.grads() | {str(k): s.grad for k, s in enumerate(balancer.loss_balancer.rule.log_variances)}

    once, twice = step(Network(), 1), step(Network(), 2)
    assert_same(twice, {name: 2 * g for name, g in once.items()})


def test_grad_is_added_in_place():
    network = Network()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.grad for name, p in network.named_parameters()}
    Balancer(TASKS, gradient="pcgrad").backward(network.losses(), shared=network.shared())
    assert all(p.grad is before[name] for name, p in network.named_parameters())
    assert not any(torch.equal(g, torch.ones_like(g)) for g in before.values())


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_frozen_and_unreached_parameters(gradient):
    network = Network()
    network.trunk[0].weight.requires_grad_(False)
    network.unused = nn.Linear(3, 3)
    extra = nn.Parameter(torch.zeros(4))
    balancer = Balancer(TASKS, gradient=gradient)
    balancer.backward(network.losses(), shared=[*network.shared(), extra, *network.unused.parameters()])
    grads = network.grads()
    untouched = {name for name, g in grads.items() if g is None}
    assert untouched == {"trunk.0.weight", "unused.weight", "unused.bias"}
    assert extra.grad is None


def test_a_wholly_frozen_trunk_trains_heads_unweighted():
    network = Network()
    network.trunk.requires_grad_(False)
    report = Balancer(TASKS, gradient="mgda").backward(network.losses(), shared=network.shared())
    twin = Network()
    sum(twin.losses().values()).backward()
    for p, q in zip(network.heads.parameters(), twin.heads.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert report.gradient_weights.tolist() == [1, 1, 1]


def test_a_task_without_a_graph_has_gradient_zero():
    network = Network()
    losses = network.losses() | {"b": torch.tensor(0.0)}
    report = Balancer(TASKS, gradient="pcgrad").backward(losses, shared=network.shared())
    assert report.gramian[1].tolist() == [0, 0, 0]
    assert report.cosines.isfinite().all()
    assert all(p.grad is None for p in network.heads["b"].parameters())


def test_a_parameter_shared_by_some_tasks_only_and_tied_heads():
    shared, tied = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": (shared * tied).sum(), "b": (3 * shared).sum(), "c": (2 * tied).sum()}
    report = Balancer(TASKS, gradient=lambda G: torch.tensor([1.0, 10.0]), heads="weighted").backward(
        losses, shared=[shared, shared]
    )
    assert shared.grad.tolist() == [31, 31]
    assert tied.grad.tolist() == [3, 3]  # "c" reaches nothing shared: weight one
    assert (report.unshared, report.gradient_weights.tolist()) == (("c",), [1, 10, 1])


def test_graph_is_freed():
    network = Network()
    losses = network.losses()
    Balancer(TASKS, gradient="mgda").backward(losses, shared=network.shared())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        sum(losses.values()).backward()


def test_half_precision_parameters():
    network = Network().bfloat16()
    network.x = network.x.bfloat16()
    report = Balancer(TASKS, gradient="mgda").backward(network.losses(), shared=network.shared())
    assert report.gramian.dtype == torch.float64
    assert {p.grad.dtype for p in network.parameters()} == {torch.bfloat16}


def test_sparse_embedding_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    z = table(torch.tensor([0, 2]))
    losses = torch.stack([z.sum(), z.square().sum()])
    expected = torch.stack([torch.autograd.grad(loss, table.weight, retain_graph=True)[0].to_dense() for loss in losses])
    report = Balancer(2, gradient="mgda").backward(losses, shared=table.parameters())
    assert table.weight.grad.is_sparse
    J = expected.flatten(1).double()
    torch.testing.assert_close(report.gramian, J @ J.T)
    direction = torch.einsum("k,kij->ij", report.gradient_weights, expected)
    torch.testing.assert_close(table.weight.grad.to_dense(), direction)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("gradient", ["mgda", "pcgrad"])
def test_features(gradient, several):
    network = Network()
    z = network.trunk(network.x)
    pieces = list(z.split(3, dim=1)) if several else z
    losses = network.losses(torch.cat(pieces, dim=1) if several else z)
    report = Balancer(TASKS, gradient=gradient, source="features").backward(losses, shared=network.shared(), features=pieces)
    twin = Network()
    features = twin.trunk(twin.x)
    rows = [torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in twin.losses(features).values()]
    G = torch.stack(rows).double() @ torch.stack(rows).double().T
    torch.testing.assert_close(report.gramian, G, rtol=1e-5, atol=1e-12)
    weights = balance.gradient_balancers.build(gradient)(G).float()
    heads = weights if gradient == "mgda" else torch.ones(3)
    assert_same(network.grads(), reference(twin, weights, heads), rtol=1e-4, atol=1e-4)


def test_paths_around_the_features_count_once():
    """A parameter below the features that a loss also reaches directly, sibling outputs, nested and repeated features."""

    def step(source, choose):
        network = Network()
        below = network.trunk[1](network.trunk[0](network.x))
        z = network.trunk[3](network.trunk[2](below))
        losses = network.losses(z)
        losses["a"] = losses["a"] + network.trunk[0].weight.square().sum()
        losses["b"] = losses["b"] + below.square().mean()
        balancer = Balancer(TASKS, gradient=lambda G: torch.tensor([1.0, 2.0, 3.0]), source=source, heads="weighted")
        balancer.backward(losses, shared=network.shared(), features=choose(below, z))
        return network.grads()

    expected = step("parameters", lambda below, z: None)
    for choose in (lambda below, z: z, lambda below, z: [below, z], lambda below, z: [z, z]):
        assert_same(step("features", choose), expected, rtol=1e-4, atol=1e-5)


def test_a_sibling_of_the_features_counts():
    encoder = nn.Linear(3, 4)
    mean, deviation = encoder(torch.ones(2, 3)).chunk(2, dim=1)
    losses = {"a": mean.square().sum() + deviation.exp().sum(), "b": mean.sum()}
    Balancer(("a", "b"), gradient=lambda G: torch.ones(2), source="features").backward(losses, features=mean)
    grads = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    mean, deviation = encoder(torch.ones(2, 3)).chunk(2, dim=1)
    (mean.square().sum() + deviation.exp().sum() + mean.sum()).backward()
    for grad, p in zip(grads, encoder.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_a_feature_that_no_task_reaches_leaves_its_parameters_alone():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    features = [one(x), other(x)]
    Balancer(2, gradient="mgda", source="features").backward({"0": features[0].sum()}, features=features)
    assert one.weight.grad is not None
    assert other.weight.grad is None


# --- absent tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
@pytest.mark.parametrize("loss", [name for name in balance.loss_balancers.names() if name not in ("stl", "igbv2")])
def test_absent_task_is_the_smaller_problem(loss, gradient):
    def train(tasks, given, nan):
        network = Network(tasks=TASKS)
        balancer = Balancer(tasks, loss=loss, gradient=gradient, nan="absent")
        for _ in range(3):
            losses = {t: v for t, v in network.losses().items() if t in given or nan}
            if nan:
                losses["b"] = losses["b"] * math.nan
            report = balancer.backward(losses, shared=network.shared())
            if balancer.needs_observation:
                with torch.no_grad():
                    balancer.observe({t: 0.9 * v for t, v in network.losses().items() if t in given})
            balancer.end_epoch()
        return network.grads(), report

    smaller, _ = train(("a", "c"), ("a", "c"), nan=False)
    absent, report = train(TASKS, ("a", "c"), nan=False)
    assert_same(absent, smaller, rtol=1e-6, atol=1e-9)
    assert report.tasks == ("a", "c")
    not_a_number, report = train(TASKS, ("a", "c"), nan=True)
    assert_same(not_a_number, smaller, rtol=1e-6, atol=1e-9)
    assert set(report.as_metrics()) >= {"loss/a", "loss/c", "weight/a"}
    assert "loss/b" not in report.as_metrics()


def test_absent_tasks_need_a_dict():
    with pytest.raises(ValueError, match=r"Use \{name: loss\}"):
        Balancer(2, nan="absent").backward(torch.tensor([1.0, math.nan], requires_grad=True))


def test_an_optimizer_with_momentum_leaves_the_parameters_of_an_absent_task_alone():
    network = Network()
    balancer = Balancer(TASKS, loss="uw")
    optimizer = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for present in (TASKS, ("a", "c"), ("a", "c")):
        optimizer.zero_grad()
        before = [s.item() for s in balancer.loss_balancer.rule.log_variances]
        balancer.backward({t: v for t, v in network.losses().items() if t in present})
        optimizer.step()
        after = [s.item() for s in balancer.loss_balancer.rule.log_variances]
        assert [a != b for a, b in zip(before, after, strict=True)] == [t in present for t in TASKS]


def test_absent_task_keeps_its_state():
    network = Network()
    for name in ("famo", "uw", "go4align"):
        balancer = Balancer(TASKS, loss=name)
        balancer.backward(network.losses())
        if balancer.needs_observation:
            balancer.observe({t: 0.9 * v.detach() for t, v in network.losses().items()})
        before = copy.deepcopy(balancer.loss_balancer.rule.state_dict())
        balancer.backward({t: v for t, v in network.losses().items() if t != "b"})
        if balancer.needs_observation:
            balancer.observe({t: 0.5 * v.detach() for t, v in network.losses().items() if t != "b"})
        changed = name == "uw"  # one parameter for each task
        for key, value in balancer.loss_balancer.rule.state_dict().items() if name != "uw" else ():
            torch.testing.assert_close(value[1], before[key][1], equal_nan=True)
            changed |= not torch.equal(value.nan_to_num(), before[key].nan_to_num())
        assert changed


def test_a_rule_with_state_by_task_must_know_who_is_present():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, losses):
            return self.weights * losses

    network = Network()
    balancer = Balancer(TASKS, loss=Fixed())
    balancer.backward(network.losses())
    with pytest.raises(ValueError, match="keyword present=None"):
        balancer.backward({"a": network.losses()["a"]})


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize("loss", balance.loss_balancers.names())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:mgda gives all weight")
def test_a_loss_that_is_not_finite_is_an_error_that_changes_nothing(loss, gradient, bad):
    network = Network()
    balancer = Balancer(TASKS, loss=loss, gradient=gradient)
    before = copy.deepcopy(balancer.state_dict())
    losses = network.losses()
    losses["b"] = losses["b"] * bad
    with pytest.raises(ValueError, match=r"finite.*'b'"):
        balancer.backward(losses, shared=network.shared())
    assert all(p.grad is None for p in network.parameters())
    assert_same_state(balancer.state_dict(), before)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_state(value, b[key])
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[key], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == b[key]


@pytest.mark.parametrize("loss", ["ls", "go4align", "famo", "rlw", "dwa"])
@pytest.mark.parametrize("where", ["shared", "head"])
def test_a_gradient_that_is_not_finite_names_the_task_and_changes_nothing(where, loss):
    theta, head = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    bad = theta if where == "shared" else head
    losses = {"a": theta.sum() + 1, "b": theta.sum() + bad.abs().sqrt().sum() + 1}
    options = {"mode": "window"} if loss == "dwa" else {}
    balancer = Balancer(("a", "b"), loss=loss, loss_options=options, gradient="mgda")
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(ValueError, match="those of b are not"):
        balancer.backward(losses, shared=[theta])
    assert theta.grad is None
    assert head.grad is None
    assert_same_state(balancer.state_dict(), before)


@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_grad_scaler(gradient, source):
    """Scaled and unscaled again, the step is the same as without a scaler."""

    def train(scaler):
        network = Network()
        balancer = Balancer(TASKS, loss="uw", gradient=gradient, source=source)
        optimizer = torch.optim.SGD([*network.parameters(), *balancer.parameters()], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            z = network.trunk(network.x)
            report = balancer.backward(network.losses(z), shared=network.shared(), features=z, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        return report, {name: p.detach() for name, p in [*network.named_parameters(), *balancer.named_parameters()]}

    off = train(torch.amp.GradScaler("cpu", enabled=False))
    on = train(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_same(on[1], off[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(on[0].loss_weights, off[0].loss_weights, rtol=1e-4, atol=1e-6)
    if gradient:
        torch.testing.assert_close(on[0].gramian, off[0].gramian, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize("loss", ["famo", "go4align", "uw"])
def test_grad_scaler_skips_what_is_not_finite(loss, gradient, kind):
    theta, head = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    balancer = Balancer(("a", "b"), loss=loss, gradient=gradient)
    state = copy.deepcopy(balancer.loss_balancer.rule.state_dict())
    optimizer = torch.optim.SGD([theta, head, *balancer.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bad = theta.sum() * math.inf if kind == "loss" else (theta - 1).abs().sqrt().sum() + head.sum()
    losses = {"a": theta.sum() + head.sum(), "b": bad}
    balancer.backward(losses, shared=[theta], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert theta.tolist() == [1, 1]
    balancer.observe({"a": torch.tensor(math.nan), "b": torch.tensor(1.0)})  # nothing to learn from a skipped step
    if loss == "famo" and gradient is None and kind == "gradient":  # finite losses were seen, but nothing was learned
        assert balancer.loss_balancer.rule.logits.tolist() == [0, 0]
    elif gradient or kind == "loss":
        assert_same_state(balancer.loss_balancer.rule.state_dict(), state)


# --- epochs, state ----------------------------------------------------------------------------------------------------


def test_end_epoch_hands_over_mean_losses_of_the_steps_a_task_was_present():
    class Listener(nn.Module):
        def forward(self, losses):
            return losses

        def end_epoch(self, mean_losses):
            self.heard = mean_losses

    balancer = Balancer(TASKS, loss=Listener())
    theta = torch.ones((), requires_grad=True)
    for a, b in ((1.0, 4.0), (3.0, None)):
        balancer.backward({"a": a * theta} | ({} if b is None else {"b": b * theta}))
    balancer.end_epoch()
    torch.testing.assert_close(
        balancer.loss_balancer.rule.heard, torch.tensor([2.0, 4.0, math.nan], dtype=torch.float64), equal_nan=True
    )
    balancer.end_epoch()
    assert balancer.loss_balancer.rule.heard.isnan().all()


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
@pytest.mark.parametrize("loss", [name for name in balance.loss_balancers.names() if name != "stl"])
def test_resuming_equals_not_stopping(loss, gradient, tmp_path):
    """Bit for bit, with the checkpoint taken in the middle of an epoch and written to disk."""

    def build():
        network = Network()
        balancer = Balancer(TASKS, loss=loss, gradient=gradient, seed=3)
        return network, balancer, torch.optim.Adam([*network.parameters(), *balancer.parameters()], lr=0.01)

    def train(network, balancer, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            balancer.backward(network.losses(), shared=network.shared())
            optimizer.step()
            if balancer.needs_observation:
                with torch.no_grad():
                    balancer.observe(network.losses())
            if step % 3 == 2:
                balancer.end_epoch()

    straight = build()
    train(*straight, range(14))
    first = build()
    train(*first, range(7))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    resumed = build()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(7, 14))
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(resumed[1].state_dict(), straight[1].state_dict())


def test_checkpoint_of_other_tasks_is_refused():
    state = Balancer(("a", "b")).state_dict()
    with pytest.raises(ValueError, match="checkpoint is of tasks"):
        Balancer(("b", "a")).load_state_dict(state)


def test_seed_decides_the_draws_and_torch_global_state_is_left_alone():
    def weights(seed):
        balancer = Balancer(TASKS, loss="rlw", gradient="pcgrad", seed=seed)
        network = Network()
        before = torch.get_rng_state()
        report = balancer.backward(network.losses(), shared=network.shared())
        assert torch.equal(before, torch.get_rng_state())
        return report.loss_weights.tolist()

    assert weights(0) == weights(0) != weights(1)


# --- rules of others --------------------------------------------------------------------------------------------------


def test_losses_keyword_gets_the_raw_losses():
    seen = {}

    def rule(gramian, *, losses):
        seen["losses"] = losses
        return torch.ones(len(gramian))

    network = Network()
    losses = network.losses()
    Balancer(TASKS, loss="scaleinvls", gradient=rule).backward(losses, shared=network.shared())
    torch.testing.assert_close(seen["losses"], torch.stack(list(losses.values())).detach().double())


def test_a_rule_that_sees_the_jacobian(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))

    @balance.gradient_balancers.register("sign_sum", sees="jacobian")
    def sign_sum(jacobian):
        return jacobian.sign().sum(dim=0)

    network = Network()
    report = Balancer(TASKS, gradient="sign_sum").backward(network.losses(), shared=network.shared())
    twin = Network()
    rows = [torch.autograd.grad(loss, list(twin.trunk.parameters()), retain_graph=True) for loss in twin.losses().values()]
    for p, *gs in zip(network.trunk.parameters(), *rows, strict=True):
        torch.testing.assert_close(p.grad, sum(g.sign() for g in gs))
    assert report.gradient_weights is None
    assert "gradient_weight/a" not in report.as_metrics()
    with pytest.raises(ValueError, match="has no weights"):
        Balancer(TASKS, gradient="sign_sum", scale="sum")


# --- report -----------------------------------------------------------------------------------------------------------


def test_report():
    theta = torch.zeros(2, requires_grad=True)
    losses = {"a": theta[0] + 1, "b": -theta[0] + theta[1] + 2}
    report = Balancer(("a", "b"), gradient="mgda").backward(losses, shared=[theta])
    assert report.conflicts == 1
    assert report.gramian.tolist() == [[1, -1], [-1, 2]]
    metrics = report.as_metrics()
    assert metrics["cosine/a__b"] == pytest.approx(-(0.5**0.5))
    assert {"loss/a": 1.0, "loss/b": 2.0, "weight/a": 1.0, "weight/b": 1.0, "conflicts": 1.0}.items() <= metrics.items()
    assert metrics["gradient_weight/a"] == pytest.approx(0.6)
    assert not any(t.requires_grad for t in (report.losses, report.weighted_losses, report.loss_weights))
    with pytest.raises(AttributeError):
        report.losses = None


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": 0}, ValueError, "at least one name"),
        ({"tasks": "ab"}, TypeError, "tasks must be names"),
        ({"tasks": ("a", "a")}, ValueError, "all distinct"),
        ({"loss": "go4aling"}, ValueError, "Did you mean 'go4align'"),
        ({"gradient": "mdga"}, ValueError, "Did you mean 'mgda'"),
        ({"gradient": 3}, TypeError, "registered name or a callable"),
        ({"loss": "go4align", "loss_options": {"groups": 2}}, ValueError, "Did you mean 'num_groups'"),
        ({"loss": "go4align", "loss_options": {"num_groups": 0}}, ValueError, "at least 1"),
        ({"loss": "go4align", "loss_options": {"num_groups": "two"}}, TypeError, "must be int"),
        ({"loss": "dwa", "loss_options": {"mode": "step"}}, ValueError, "must be one of 'epoch', 'window'"),
        ({"loss": "dwa", "loss_options": {"temperature": 0.0}}, ValueError, "must be positive"),
        ({"loss": "dwa", "loss_options": {"window": 0}}, ValueError, "at least 1"),
        ({"loss": "famo", "loss_options": {"min_losses": [0.0]}}, ValueError, "one number for each"),
        ({"loss": "famo", "loss_options": {"gamma": -1.0}}, ValueError, "not be negative"),
        ({"loss": "famo", "loss_options": {"lr": 0.0}}, ValueError, "must be positive"),
        ({"loss": "go4align", "loss_options": {"step_size": -1.0}}, ValueError, "not be negative"),
        ({"loss": "rlw", "loss_options": {"scale": 0.0}}, ValueError, "must be positive"),
        ({"loss": "stl", "loss_options": {"main_task": 3}}, ValueError, r"in 0\.\.2"),
        ({"loss": torch.log, "loss_options": {"x": 1}}, ValueError, "functools.partial"),
        ({"gradient_options": {"order": "fixed"}}, ValueError, "need a gradient balancer"),
        ({"gradient": "pcgrad", "gradient_options": {"order": "sorted"}}, ValueError, "must be one of"),
        ({"source": "feature"}, ValueError, "source must be one of"),
        ({"heads": "scaled"}, ValueError, "heads must be one of"),
        ({"scale": "mean"}, ValueError, "scale must be one of"),
        ({"nan": "ignore"}, ValueError, "nan must be one of"),
    ],
)
def test_mistakes_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Balancer(**({"tasks": TASKS} | arguments))


def scalar():
    return torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({"d": scalar()}, ValueError, "Unknown task 'd'"),
        ({}, ValueError, "at least one of the tasks"),
        ({"a": 1.0}, TypeError, "must be a tensor"),
        ({"a": torch.ones(4, requires_grad=True)}, ValueError, r"Use its \.mean\(\)"),
        (torch.ones(()), ValueError, r"torch\.stack"),
        ([scalar()], TypeError, "dict by task"),
        ({"a": torch.tensor(1.0)}, ValueError, "No loss requires a gradient"),
    ],
)
def test_mistakes_in_the_losses(losses, error, message):
    with pytest.raises(error, match=message):
        Balancer(TASKS).backward(losses)


@pytest.mark.parametrize(
    ("shared", "error", "message"),
    [
        (None, TypeError, "but got nothing"),
        (nn.Linear(2, 2), TypeError, r"shared=model\.trunk\.parameters\(\)"),
        (torch.ones(2, requires_grad=True), TypeError, "iterable of parameters"),
        ([torch.ones(2, requires_grad=True)], ValueError, "A loss must reach a shared parameter"),
        ([torch.ones(2, requires_grad=True) * 2], TypeError, "give it as features"),
        (["weight"], TypeError, "must hold parameters"),
    ],
)
def test_mistakes_in_shared(shared, error, message):
    with pytest.raises(error, match=message):
        Balancer(TASKS, gradient="mgda").backward(Network().losses(), shared=shared)


def test_features_are_needed_for_source_features():
    network = Network()
    with pytest.raises(ValueError, match="features must be one tensor or several"):
        Balancer(TASKS, gradient="mgda", source="features").backward(network.losses(), shared=network.shared())


@pytest.mark.parametrize("loss", ["scaleinvls", "famo", "go4align"])
def test_a_loss_outside_the_domain_names_the_task_and_changes_nothing(loss):
    network = Network()
    losses = network.losses()
    losses["c"] = losses["c"] - 1e6
    balancer = Balancer(TASKS, loss=loss)
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(ValueError, match=f"Loss of task 'c' is -.*'{loss}'"):
        balancer.backward(losses)
    assert_same_state(balancer.state_dict(), before)


def test_famo_takes_lower_bounds():
    theta = scalar()
    balancer = Balancer(("a", "b"), loss="famo", loss_options={"min_losses": [-5.0, 0.0]})
    report = balancer.backward({"a": -3 * theta, "b": 2 * theta})
    assert report.loss_weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda L: L.sum(), "must return shape"),
        (lambda L: L.detach(), "detached"),
        (lambda L: (L - L.max()).log(), "must return finite losses"),
    ],
)
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_a_broken_loss_rule_is_told(rule, message, gradient):
    network = Network()
    with pytest.raises(ValueError, match=message):
        Balancer(TASKS, loss=rule, gradient=gradient).backward(network.losses(), shared=network.shared())


@pytest.mark.parametrize("rule", [lambda G: G, lambda G: torch.full((3,), math.nan), lambda G: 1.0])
def test_a_broken_gradient_rule_is_told(rule):
    network = Network()
    with pytest.raises(ValueError, match="must return 3 finite weights"):
        Balancer(TASKS, gradient=rule).backward(network.losses(), shared=network.shared())


def test_clipping_comes_after_the_stage():
    """The published FAMO code clips before its backward pass, so that nothing is clipped."""
    network = Network()
    Balancer(TASKS, loss="famo").backward({t: 100 * v for t, v in network.losses().items()})
    before = torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    assert before > 1e-3
    after = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    assert after.item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("loss", ["go4align", "uw", ("scaleinvls", "rlw")])
def test_a_loss_balancer_that_has_no_effect_warns(loss):
    with pytest.warns(UserWarning, match="nashmtl ignores positive loss weights"):
        Balancer(TASKS, loss=loss, gradient="nashmtl")


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("loss", ["scaleinvls", "go4align", "uw"])
def test_nash_after_any_positive_weights_is_nash(loss):
    def grads(loss):
        network = Network()
        Balancer(TASKS, loss=loss, gradient="nashmtl").backward(network.losses(), shared=network.shared())
        return network.grads()

    assert_same(grads(loss), grads("ls"), rtol=1e-4, atol=1e-5)


def test_stl_with_mgda_warns():
    with pytest.warns(UserWarning, match="will not train"):
        Balancer(TASKS, loss="stl", gradient="mgda")


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="biased"):
        Balancer(TASKS).backward(Network().losses())


# --- what others do around it ----------------------------------------------------------------------------------------


def test_a_used_up_generator_is_told():
    network = Network()
    shared = network.shared()
    balancer = Balancer(TASKS, gradient="mgda")
    balancer.backward(network.losses(), shared=shared)
    with pytest.raises(ValueError, match="generator that was used up"):
        balancer.backward(network.losses(), shared=shared)


def test_autocast_does_not_blunt_the_direction():
    theta = torch.randn(1000, requires_grad=True)
    data = torch.randn(2, 1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = {str(k): (theta * data[k]).sum() for k in range(2)}
        Balancer(2, gradient=lambda G: torch.ones(2)).backward(losses, shared=[theta])
    torch.testing.assert_close(theta.grad, data.sum(dim=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
@pytest.mark.parametrize("loss", ["famo", "go4align", "dwa"])
def test_a_parent_that_is_cast_leaves_the_state_of_rules_in_float64(loss, cast):
    parent = nn.Module()
    parent.balancer = Balancer(TASKS, loss=loss)
    cast(parent)
    assert {b.dtype for b in parent.balancer.loss_balancer.rule.buffers() if b.is_floating_point()} == {torch.float64}
    assert parent.balancer.double() is parent.balancer


def test_norm_scale_at_very_unequal_gradients():
    theta = torch.zeros(2, requires_grad=True)
    Balancer(2, gradient="mgda", scale="norm").backward({"0": theta[0] + 1, "1": 1e7 * theta[1] + 1}, shared=[theta])
    assert theta.grad.norm().item() == pytest.approx(1e7, rel=1e-6)


@pytest.mark.parametrize("gradient", [None, "pcgrad"])
def test_parameters_of_a_plain_callable_learn(gradient):
    s = torch.zeros(3, requires_grad=True)
    network = Network()
    losses = network.losses()
    Balancer(TASKS, loss=lambda L: (-s).exp() * L + s, gradient=gradient).backward(losses, shared=network.shared())
    torch.testing.assert_close(s.grad, 1 - torch.stack(list(losses.values())).detach())


def test_sparse_heads():
    table, shared = nn.Embedding(5, 3, sparse=True), torch.ones(3, requires_grad=True)
    for _ in range(2):
        z = table(torch.tensor([0, 2])) * shared
        Balancer(2, gradient="mgda").backward(torch.stack([z.sum(), z.square().sum()]), shared=[shared])
    assert table.weight.grad.is_sparse


def test_two_optimizers_skip_together():
    theta = torch.ones(2, requires_grad=True)
    balancer = Balancer(1, loss="uw", gradient="mgda")
    optimizers = [torch.optim.SGD([theta], lr=0.1), torch.optim.SGD(balancer.parameters(), lr=0.1)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    balancer.backward({"0": theta.sum() * math.inf}, shared=[theta], scaler=scaler)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert theta.tolist() == [1, 1]
    assert balancer.loss_balancer.rule.log_variances[0].item() == 0


def test_the_two_rules_draw_different_numbers():
    balancer = Balancer(3, loss="rlw", gradient="pcgrad", seed=5)
    assert not torch.equal(balancer.loss_balancer.rule.random.normal(4), balancer.gradient_balancer.rule.random.normal(4))


def test_draws_stay_on_the_host():
    with torch.device("meta"):
        assert Balancer(3, loss="rlw").loss_balancer.rule.random.normal(2).device.type == "cpu"


def test_a_directions_shape_and_values_are_checked(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))
    balance.gradient_balancers.register("short", sees="jacobian")(lambda J, *, losses: J[0, :-1] * losses[0])
    network = Network()
    with pytest.raises(ValueError, match="finite direction"):
        Balancer(TASKS, gradient="short").backward(network.losses(), shared=network.shared())


def test_report_is_detached_even_if_the_rule_learns():
    w = torch.ones(3, requires_grad=True)
    network = Network()
    report = Balancer(TASKS, gradient=lambda G: w.double() * 2).backward(network.losses(), shared=network.shared())
    assert not report.gradient_weights.requires_grad


def test_complex_parameters_are_refused():
    theta = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real"):
        Balancer(1, gradient="mgda").backward({"0": theta.abs().sum()}, shared=[theta])


@pytest.mark.parametrize("name", ["rlw", "famo", "go4align", "uw", "dwa"])
def test_copies_and_pickles(name):
    import pickle

    balancer = Balancer(TASKS, loss=name, gradient="pcgrad")
    network = Network()
    balancer.backward(network.losses(), shared=network.shared())
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert_same_state(twin.state_dict(), balancer.state_dict())
