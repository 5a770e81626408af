"""Steps that fail or are skipped, unshared and empty tasks, deep graphs, dtypes, devices, and the edges of the interface."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import balance
from balance import Balancer, compose
from balance.profiling import peak_memory

TASKS = ("a", "b", "c")


def ones(gramian):
    return torch.ones(len(gramian), dtype=gramian.dtype)


class Spoiling(torch.autograd.Function):
    """Multiplies gradients by infinity or NaN when it is switched on."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return (g if ctx.factor is None else g * ctx.factor), None


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(5, 5), nn.Linear(5, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
        self.x = torch.randn(7, 5)

    def losses(self, factor=None, tasks=TASKS):
        z = self.high(Spoiling.apply(self.low(self.x), factor)).tanh()
        return z, {task: (self.heads[task](z) - k - 1).square().mean() for k, task in enumerate(TASKS) if task in tasks}

    def shared(self):
        return [*self.low.parameters(), *self.high.parameters()]


def layers():
    torch.manual_seed(0)
    return Layers()


KINDS = {
    "plain": {},
    "reused": {"gradient": "every"},
    "nashmtl": {"gradient": "every_nashmtl"},
    "measure": {},
    "features": {"source": "features"},
    "gramian": {"memory": "gramian"},
}


def stage_of(kind, **options):
    options = {"gradient": "mgda"} | KINDS[kind] | options
    if options["gradient"] in ("every", "every_nashmtl"):
        options["gradient"] = compose.every(5, "mgda" if options["gradient"] == "every" else "nashmtl", 3)
    return Balancer(TASKS, **options)


def arguments_of(kind, model, z):
    extra = {"measure": {"measure": model.high.parameters()}, "features": {"features": z}}.get(kind, {})
    return {"shared": model.shared()} | extra


def state_of(stage):
    return copy.deepcopy(stage.state_dict())


def assert_same_state(stage, before):
    now = stage.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.filterwarnings("ignore:nashmtl ignores")
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_never_reaches_grad(kind, factor):
    model = layers()
    stage = stage_of(kind, loss="go4align")
    for step in range(2):
        z, losses = model.losses(factor if step else None)
        if not step:
            stage.backward(losses, **arguments_of(kind, model, z))
            grads, state = [p.grad.clone() for p in model.parameters()], state_of(stage)
            continue
        with pytest.raises(ValueError, match="Gradients must be finite"):
            stage.backward(losses, **arguments_of(kind, model, z))
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    assert_same_state(stage, state)
    z, losses = model.losses()
    stage.backward(losses, **arguments_of(kind, model, z))  # the next step is an ordinary one


@pytest.mark.filterwarnings("ignore:nashmtl ignores")
@pytest.mark.parametrize("loss", ["famo", "go4align", "uw"])
@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_no_rule_learns_from_a_step_that_the_scaler_skips(kind, loss):
    model = layers()
    stage = Balancer(TASKS, loss=loss) if kind == "none" else stage_of(kind, loss=loss)
    optimizer = torch.optim.SGD([*model.parameters(), *stage.parameters()], 0.01)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        optimizer.zero_grad()
        z, losses = model.losses(float("inf") if step == 1 else None)
        before, weight = state_of(stage), model.low.weight.clone()
        stage.backward(losses, scaler=scaler, **arguments_of(kind, model, z))
        scaler.step(optimizer)
        scaler.update()
        stage.observe({task: 0.5 * value.detach() for task, value in losses.items()})
        assert torch.equal(weight, model.low.weight) == (step == 1)
        if step == 1:
            assert_same_state(stage, before)


def failing(gramian):
    raise ValueError("no solution")


@pytest.mark.parametrize("loss", balance.loss_balancers.names())
def test_a_step_that_fails_moves_no_rule(loss):
    options = {"dwa": {"mode": "window"}, "famo": {"next_batch": True}}.get(loss, {})
    stage = Balancer(2, loss=loss, gradient=failing, loss_options=options)
    theta = torch.ones(3, requires_grad=True)
    before = state_of(stage)
    for _ in range(2):
        with pytest.raises(ValueError, match="no solution"):
            stage.backward({"0": theta.square().sum(), "1": (theta - 3).square().sum()}, shared=[theta])
    assert_same_state(stage, before)
    assert theta.grad is None
    assert all(p.grad is None for p in stage.parameters())


def test_a_failed_step_does_not_move_the_gradient_rule_either():
    stage = Balancer(TASKS, gradient="pcgrad", loss=lambda losses: losses * torch.tensor(float("inf")))
    before = state_of(stage)
    theta = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="The loss balancer must return finite losses"):
        stage.backward(theta * 1.0, shared=[theta])
    assert_same_state(stage, before)


# --- tasks that do not reach what is shared -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", ["mgda", "imtl", "nashmtl", "pcgrad", "cagrad", "graddrop", "every"])
def test_a_task_without_path_to_the_shared_parameters_is_trained_by_itself(gradient, source, heads):
    if gradient == "graddrop" and heads == "weighted":
        pytest.skip("it has no weights")
    results = []
    for with_probe in (False, True):
        torch.manual_seed(0)
        trunk, a, b, probe = nn.Linear(6, 16), nn.Linear(16, 1), nn.Linear(16, 2), nn.Linear(16, 1)
        rule = compose.every(3, "mgda", 3) if gradient == "every" else gradient
        stage = Balancer(("a", "probe", "b"), gradient=rule, source=source, heads=heads, seed=3)
        x = torch.randn(8, 6)
        for _ in range(2):
            z = trunk(x).tanh()
            losses = {"a": a(z).square().mean(), "b": (b(z) - 1).square().mean()}
            if with_probe:
                losses["probe"] = (probe(z.detach()) - 2).square().mean()
            report = stage.backward(losses, shared=trunk.parameters(), features=z)
        results.append([p.grad.clone() for module in (trunk, a, b) for p in module.parameters()])
        assert report.unshared == (("probe",) if with_probe else ())
    torch.testing.assert_close(results[1], results[0])
    (own,) = torch.autograd.grad((probe(z.detach()) - 2).square().mean(), [probe.weight])
    torch.testing.assert_close(probe.weight.grad, 2 * own)
    if report.gradient_weights is not None:
        assert report.gradient_weights[report.tasks.index("probe")] == 1


def test_a_task_that_reaches_the_shared_part_through_the_loss_balancer_takes_part():
    shared, own = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": shared.square().sum(), "b": own.sum()}
    seen = []

    def rule(gramian):
        seen.append(gramian.shape)
        return torch.ones(len(gramian))

    Balancer(("a", "b"), loss=lambda L: L * L.flip(0), gradient=rule).backward(losses, shared=[shared])
    assert seen == [(2, 2)]
    torch.testing.assert_close(shared.grad, torch.full((2,), 2 * 2 * 2.0))


# --- empty tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"loss": "famo"}, {"loss": "uw"}, {"loss": "go4align"}, {"gradient": "mgda"}], ids=str)
def test_a_loss_of_zero_can_stand_for_an_absent_task(options):
    results = []
    for empty in (False, True):
        theta = torch.ones(2, requires_grad=True)
        stage = Balancer(("a", "empty", "b"), zero="absent", **options)
        losses = {"a": theta.square().sum(), "b": (theta - 3).square().sum()}
        if empty:
            losses["empty"] = (0 * theta).sum()
        report = stage.backward(losses, shared=[theta])
        assert report.tasks == ("a", "b")
        results.append((theta.grad, report.loss_weights))
    torch.testing.assert_close(*results)


def test_zero_losses_of_a_vector_can_be_absent():
    theta = torch.ones(2, requires_grad=True)
    report = Balancer(3, zero="absent", gradient="mgda").backward(
        torch.stack([theta.sum(), 0 * theta.sum(), theta.square().sum()]), shared=[theta]
    )
    assert report.tasks == ("0", "2")


def test_a_gradient_of_zero_is_left_out_of_the_rule_where_zero_means_absent():
    theta, head = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": theta.square().sum(), "b": 1 + (0 * theta).sum() + head.sum()}
    report = Balancer(("a", "b"), zero="absent", gradient="mgda").backward(losses, shared=[theta])
    assert report.unshared == ("b",)
    assert theta.grad.tolist() == [2, 2]
    assert head.grad.tolist() == [1, 1]


def test_all_losses_zero_is_an_error():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="All losses are NaN or zero"):
        Balancer(1, zero="absent").backward([(0 * theta).sum()][0][None])


def test_a_number_for_an_absent_task_is_told_what_to_do():
    with pytest.raises(TypeError, match="Leave a task that has no labels in this batch out of the dict"):
        Balancer(("a", "b")).backward({"a": torch.ones((), requires_grad=True), "b": 0.0})


# --- what graphs are made of ----------------------------------------------------------------------------------------------


def test_recomputation_of_checkpoints_is_at_most_one_for_each_task():
    calls = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

        def forward(self, x):
            calls.append(0)
            for layer in self.layers:
                x = layer(x).relu()
            return x

    torch.manual_seed(0)
    first, block, x = nn.Linear(64, 64), Block(), torch.randn(4, 64)
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in TASKS)
    for options in ({}, {"memory": "gramian"}, {"source": "features"}):
        z = checkpoint(block, first(x), use_reentrant=False)
        calls.clear()
        losses = {task: h(z).square().mean() for task, h in zip(TASKS, heads, strict=True)}
        Balancer(TASKS, gradient=ones, **options).backward(
            losses, shared=[*first.parameters(), *block.parameters()], features=z
        )
        assert len(calls) == (1 if "source" in options else 3)


def test_memory_with_checkpoints_is_that_of_the_gradients_of_the_tasks():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(8))
    heads, x = nn.ModuleList(nn.Linear(64, 1) for _ in range(4)), torch.randn(2048, 64)
    parameters = list(blocks.parameters())

    def losses():
        z = x
        for block in blocks:
            z = checkpoint(block, z, use_reentrant=False)
        return torch.stack([(h(z) - k).square().mean() for k, h in enumerate(heads)])

    def plain():
        rows = [torch.autograd.grad(loss, parameters, retain_graph=k < 3) for k, loss in enumerate(losses())]
        del rows

    limit = peak_memory(plain) + 2 * sum(p.numel() * 4 for p in parameters)
    for memory in ("jacobian", "gramian"):
        stage = Balancer(4, gradient="nashmtl", memory=memory)
        assert peak_memory(lambda stage=stage: stage.backward(losses(), shared=parameters)) <= limit
        for p in (*parameters, *heads.parameters()):
            p.grad = None


def test_offloaded_activations_come_back_one_by_one():
    torch.manual_seed(0)
    trunk = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(64, 64), nn.Tanh())])
    heads, x = nn.ModuleList(nn.Linear(64, 1) for _ in TASKS), torch.randn(4, 64)
    counts = []
    for balanced in (False, True):
        count = 0

        def unpack(tensor):
            nonlocal count
            count += 1
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, unpack):
            z = trunk(x)
            losses = {task: (h(z) - k).square().mean() for k, (task, h) in enumerate(zip(TASKS, heads, strict=True))}
        if balanced:
            Balancer(TASKS, gradient="mgda", memory="gramian").backward(losses, shared=trunk.parameters())
        else:
            for loss in losses.values():
                torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True)
        counts.append(count)
    assert counts[1] <= counts[0]


DEEP = """
import torch, balance, sys
from torch import nn
f, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(8, 4)
for step in range(2):
    x = torch.randn(8, 4)
    for _ in range(8000):
        x = x + 0.001 * f(x)
    losses = {"a": x.square().mean(), "b": (x - 1).square().mean()}
    balance.Balancer(("a", "b"), gradient="mgda").backward(losses, shared=f.parameters())
    if sys.argv[1] == "losses first":
        del losses
        balance.engine.deep_graphs.free_released_graphs()
    elif sys.argv[1] == "kept":
        kept = losses
del x
print("done")
"""


@pytest.mark.parametrize("order", ["together", "losses first", "kept"])
def test_graphs_fifty_thousand_nodes_deep(order):
    done = subprocess.run([sys.executable, "-c", DEEP, order], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("source", ["parameters", "features"])
def test_frozen_between_forward_and_backward(source):
    torch.manual_seed(0)
    trunk, a, b = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 2)
    z = trunk(torch.randn(4, 6))
    losses = {"a": a(z).square().mean(), "b": (b(z) - 1).square().mean()}
    b.requires_grad_(False)
    trunk.bias.requires_grad_(False)
    shared = None if source == "features" else trunk.parameters()
    Balancer(("a", "b"), gradient="pcgrad", source=source).backward(losses, shared=shared, features=z)
    assert [p.grad is None for m in (trunk, a, b) for p in (m.weight, m.bias)] == [False, True, False, False, True, True]


@pytest.mark.parametrize("options", [{}, {"gradient": "mgda"}, {"loss": "uw"}], ids=str)
def test_inside_no_grad(options):
    results = []
    for inside in (False, True):
        theta = torch.ones(2, requires_grad=True)
        losses = {"a": theta.square().sum(), "b": theta.sum()}
        stage = Balancer(("a", "b"), **options)
        with torch.set_grad_enabled(not inside):
            stage.backward(losses, shared=[theta])
        results.append(theta.grad)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:mgda gives all weight")
@pytest.mark.parametrize("loss", balance.loss_balancers.names())
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_another_default_device(loss, gradient):
    results = []
    for device in (None, "meta"):
        theta = torch.ones(2, requires_grad=True)
        stage = Balancer(("a", "b"), loss=loss, gradient=gradient)
        losses = {"a": theta.square().sum(), "b": theta.sum() + 1}
        torch.set_default_device(device)
        try:
            stage.backward(losses, shared=[theta])
            stage.observe({task: 0.5 * loss.detach() for task, loss in losses.items()})
            stage.end_epoch()
        finally:
            torch.set_default_device(None)
        results.append(theta.grad)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:nashmtl ignores")
def test_meta_initialisation_and_casts_keep_the_state():
    with torch.device("meta"):
        model = nn.ModuleDict({"net": nn.Linear(2, 2), "balancer": Balancer(3, loss="uw", gradient="nashmtl")})
    model.to_empty(device="cpu")
    reference = Balancer(3, loss="uw", gradient="nashmtl")
    for name, value in model["balancer"].state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], equal_nan=True)
    cast = reference.double().float()
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    assert cast.loss_sums.dtype == cast.stretch.dtype == torch.float64
    assert cast.half().loss_sums.dtype == torch.float64
    theta = torch.ones(2, requires_grad=True)
    model["balancer"].backward({str(k): ((theta - k) ** 2).sum() + 1 for k in range(3)}, shared=[theta])


@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_small_losses_of_half_precision(gradient):
    """1e-5 in float16 has a weight of 1e5, more than float16 holds; the gradient of its logarithm is 1."""
    theta = torch.ones(2, dtype=torch.float16, requires_grad=True)
    stage = Balancer(2, loss="scaleinvls", gradient=gradient, scale="sum" if gradient else "paper")
    report = stage.backward({"0": theta[0] * 1e-5, "1": theta[1] * 1.0}, shared=[theta])
    torch.testing.assert_close(theta.grad, torch.ones(2, dtype=torch.float16), rtol=2e-3, atol=0)
    assert report.loss_weights.isfinite().all()


class InPlace(torch.autograd.Function):
    """Changes the gradient that it gets, against the rules."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mul_(3)


def test_tasks_do_not_share_the_gradient_with_which_their_passes_begin():
    t = torch.ones(3, requires_grad=True)
    report = Balancer(3, gradient="mgda").backward({str(k): InPlace.apply(t.sum()) for k in range(3)}, shared=[t])
    assert (report.gramian.diagonal() / 3).sqrt().tolist() == [3, 3, 3]


def test_a_sum_of_finite_head_gradients_may_overflow():
    shared, head = torch.ones(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    losses = {"0": shared.sum() + 2e38 * head.sum(), "1": shared.sum()}
    Balancer(2, gradient="mgda", heads="unweighted").backward(losses, shared=[shared])
    assert (head.grad == 2e38).all()


def test_a_weighted_head_gradient_that_overflows_is_an_error():
    shared, head = torch.ones(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    losses = {"0": shared.sum() + 2e38 * head.sum(), "1": shared.sum()}
    with pytest.raises(ValueError, match="Gradients must be finite"):
        Balancer(2, loss=lambda L: 10 * L, gradient="pcgrad").backward(losses, shared=[shared])
    assert head.grad is None


def test_a_sum_that_overflows_in_the_dtype_of_a_head_is_an_error():
    shared, head = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float16, requires_grad=True)
    losses = {"a": shared.sum() + (head * 100).float().sum() * 100, "b": 2 * shared.sum()}
    with pytest.raises(ValueError, match="Gradients must be finite"):
        Balancer(("a", "b"), loss=lambda L: 100 * L, gradient="pcgrad").backward(losses, shared=[shared])
    assert head.grad is None


@pytest.mark.parametrize("gradient", ["graddrop", "mgda"])
def test_features_can_be_several_outputs_of_one_operation(gradient):
    torch.manual_seed(0)
    trunk, a, b = nn.Linear(4, 6), nn.Linear(3, 1), nn.Linear(3, 1)
    u, v = trunk(torch.randn(5, 4)).chunk(2, dim=1)
    u = u.tanh()
    losses = {"a": a(u).square().mean(), "b": b(v).square().mean()}
    want = torch.autograd.grad(sum(losses.values()), trunk.weight, retain_graph=True)[0]
    options = {"gradient_options": {"leak": 1.0}} if gradient == "graddrop" else {}
    report = Balancer(("a", "b"), gradient=gradient, source="features", **options).backward(losses, features=[u, v])
    if gradient == "graddrop":
        torch.testing.assert_close(trunk.weight.grad, want)
    assert report.gramian[0, 1] == 0


@pytest.mark.parametrize("way", [{}, {"engine": "batched"}, {"memory": "gramian"}, {"source": "features"}], ids=str)
def test_complex_features_and_heads(way):
    torch.manual_seed(0)
    trunk, x = nn.Linear(4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    heads = [nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)) for _ in TASKS]

    def losses():
        z = torch.view_as_complex(trunk(x).view(3, 3, 2))
        return z, {task: (z @ h).abs().square().mean() for task, h in zip(TASKS, heads, strict=True)}

    z, found = losses()
    inputs = [z] if "source" in way else list(trunk.parameters())
    rows = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in found.values()]
    J = torch.stack(
        [torch.cat([(torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).flatten() for g in row]) for row in rows]
    )
    want = torch.autograd.grad(found["a"] + 2 * found["b"] + 3 * found["c"], trunk.weight, retain_graph=True)[0]
    own = [torch.autograd.grad(loss, h, retain_graph=True)[0] for loss, h in zip(found.values(), heads, strict=True)]
    z, found = losses()
    weights = torch.tensor([1.0, 2.0, 3.0])
    report = Balancer(TASKS, gradient=lambda G: weights, **way).backward(found, shared=trunk.parameters(), features=z)
    torch.testing.assert_close(report.gramian, J @ J.T)
    torch.testing.assert_close(trunk.weight.grad, want)
    torch.testing.assert_close([h.grad for h in heads], own)


# --- parameters of the stage, factors, checkpoints --------------------------------------------------------------------------


def balanced_sum(theta):
    return {"a": theta.square().sum(), "b": (3 * theta).square().sum()}


@pytest.mark.parametrize("how", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_own_gradients_are_those_of_this_step_also_if_nobody_clears_them(gradient, how):
    histories = []
    for clears in (True, False):
        theta, stage = nn.Parameter(torch.ones(2)), Balancer(("a", "b"), loss="uw", gradient=gradient)
        optimizer = torch.optim.AdamW([theta, *stage.parameters()], lr=1e-2, **({how: True} if how != "plain" else {}))
        history = []
        for _ in range(4):
            theta.grad = None
            if clears:
                optimizer.zero_grad()
            stage.backward(balanced_sum(theta), shared=[theta])
            history.append([p.grad.item() for p in stage.parameters()])
            optimizer.step()
        histories.append(history)
    assert histories[0] == histories[1]


def test_own_gradients_add_up_over_micro_batches_and_not_over_skipped_steps():
    theta, stage = nn.Parameter(torch.ones(2)), Balancer(("a", "b"), loss="uw")
    stage.backward(balanced_sum(theta))
    once = [p.grad.item() for p in stage.parameters()]
    stage.backward(balanced_sum(theta))
    assert [p.grad.item() for p in stage.parameters()] == [2 * g for g in once]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    losses = balanced_sum(theta)
    stage.backward({"a": losses["a"] * float("nan"), "b": losses["b"]}, scaler=scaler)
    assert all(p.grad.isnan() for p in stage.parameters())
    stage.backward(balanced_sum(theta))
    assert [p.grad.item() for p in stage.parameters()] == once


@pytest.mark.parametrize("gradient", [None, "nashmtl", "pcgrad", "graddrop", "every"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.filterwarnings("ignore:nashmtl ignores")
def test_a_factor_acts_on_grad_alone(gradient, scaled):
    results, reports = [], []
    for factor in (1.0, 0.25):
        model = layers()
        rule = compose.every(2, "mgda", 3) if gradient == "every" else gradient
        stage = Balancer(TASKS, loss="uw", gradient=rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        reports += [stage.backward(model.losses()[1], shared=model.shared(), scaler=scaler, factor=factor) for _ in range(2)]
        results.append([p.grad / factor for p in (*model.parameters(), *stage.parameters())])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(reports[3].loss_weights, reports[1].loss_weights)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "half", None])
def test_a_factor_must_be_a_positive_number(factor):
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="factor must be a positive number"):
        Balancer(2).backward(theta * 1, factor=factor)


def test_a_factor_does_not_hide_nan():
    theta = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="Losses must be finite"):
        Balancer(2).backward(theta * float("nan"), factor=0.5)
    assert theta.grad is None


@pytest.mark.parametrize("loss", balance.loss_balancers.names())
@pytest.mark.filterwarnings("ignore:nashmtl ignores")
def test_state_dicts_hold_tensors_only(loss, tmp_path):
    model = nn.ModuleDict({"stage": Balancer(TASKS, loss=loss, gradient="nashmtl"), "splitter": balance.Splitter(TASKS)})
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "state.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))


def test_checkpoints_of_version_0_1_load():
    """Tasks were a dict then, and a chain of one rule was a module around the rule."""
    chain = Balancer(TASKS, loss=("famo",))
    old = {name.replace("loss.", "loss.stateful.0."): value for name, value in chain.state_dict().items()}
    old["_extra_state"] = {"tasks": TASKS}
    chain.load_state_dict(old)
    with pytest.raises(ValueError, match="The checkpoint is of tasks"):
        Balancer(("x", "y", "z"), loss=("famo",)).load_state_dict(old)


def test_a_chain_of_one_is_that_rule():
    one, chain = Balancer(2, loss="famo"), Balancer(2, loss=("famo",))
    chain.load_state_dict(one.state_dict())
    one.load_state_dict(chain.state_dict())


# --- the interface --------------------------------------------------------------------------------------------------------


def test_options_are_given_by_name():
    with pytest.raises(TypeError):
        Balancer(2, "ls", "mgda", {})
    with pytest.raises(TypeError):
        balance.Splitter(2, "mgda", {})


@pytest.mark.parametrize("gradient", [None, "mgda"])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"shared": "not parameters"}, TypeError),
        ({"shared": []}, ValueError),
        ({"features": 3}, ValueError),
        ({"measure": 7}, TypeError),
    ],
)
def test_arguments_that_are_given_are_checked(gradient, given, error):
    t = torch.ones(3, requires_grad=True)
    with pytest.raises(error, match=next(iter(given))):
        Balancer(("a", "b"), gradient=gradient).backward({"a": t.sum(), "b": (t**2).sum()}, **({"shared": [t]} | given))
    assert t.grad is None


def test_repr_says_what_a_stage_is():
    stage = Balancer(("depth", "normals"), gradient="cagrad", gradient_options={"c": 0.9}, scale="norm")
    assert repr(stage) == "Balancer(('depth', 'normals'), loss=ls, gradient=cagrad(c=0.9), scale='norm')"
    chain = Balancer(2, loss=("dwa", "uw"), loss_options={"uw": {"init": 1.0}}, memory="gramian", zero="absent")
    assert repr(chain) == "Balancer(('0', '1'), loss=dwa + uw(init=1.0), gradient=None, zero='absent', memory='gramian')"


def test_a_parameter_that_one_task_reaches_warns_once():
    torch.manual_seed(0)
    trunk, a, b, x = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1), torch.randn(5, 3)
    stage = Balancer(("a", "b"), gradient="mgda")

    def step():
        z = trunk(x).tanh()
        losses = {"a": a(z).square().mean(), "b": b(z).square().mean()}
        stage.backward(losses, shared=[*trunk.parameters(), *b.parameters()])

    with pytest.warns(UserWarning, match=r"shape \(1, 4\) is reached by task 'b' only \(2 such in all\)") as record:
        step()
    assert record[0].filename == __file__
    step()


@pytest.mark.parametrize(
    ("loss", "call"), [("famo", "observe"), ("dwa", "end_epoch"), ("igbv1", "end_epoch"), ("igbv2", "end_epoch")]
)
def test_a_call_that_never_comes_is_asked_for_once(loss, call):
    v = torch.tensor([1.0, 2.0], requires_grad=True)
    for forgets in (True, False):
        stage = Balancer(2, loss=loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(450):
                stage.backward(v * 1)
                if not forgets:
                    stage.observe(0.9 * v.detach())
                    stage.end_epoch()
        assert [call in str(warning.message) for warning in caught] == [True] * forgets
        assert all(warning.filename == __file__ for warning in caught)


def test_measure_keeps_the_length_of_the_direction():
    for scale in ("paper", "norm"):
        lengths = []
        for part in (False, True):
            torch.manual_seed(0)
            trunk = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())])
            heads, x = nn.ModuleList(nn.Linear(32, 1) for _ in TASKS), torch.randn(64, 32)
            z = trunk(x)
            losses = torch.stack([(h(z) - k).square().mean() for k, h in enumerate(heads)])
            rule = compose.every(3, "nashmtl", 3) if part else "nashmtl"
            stage = Balancer(3, gradient=rule, scale=scale)
            extra = {"measure": trunk[10].parameters()} if part else {}
            stage.backward(losses, shared=trunk.parameters(), **extra)
            lengths.append(torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm().item())
            if part:  # and a step that reuses the weights
                trunk.zero_grad()
                z = trunk(x)
                stage.backward(
                    torch.stack([(h(z) - k).square().mean() for k, h in enumerate(heads)]), shared=trunk.parameters()
                )
                lengths.append(torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm().item())
        assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("gradient", ["mgda", "nashmtl"])
def test_copies_and_pickles_work_after_steps(gradient):
    model = layers()
    stage = Balancer(TASKS, gradient=gradient, engine="batched")
    z, losses = model.losses()
    stage.backward(losses, shared=model.shared(), features=z)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        z, losses = model.losses()
        other.backward(losses, shared=model.shared(), features=z)


@pytest.mark.parametrize("way", [{}, {"source": "features"}, {"engine": "batched"}], ids=str)
def test_retained_gradients_of_features_are_those_of_the_tasks_once(way):
    if "engine" in way:
        pytest.skip("torch retains no gradient of a batched pass")
    torch.manual_seed(0)
    trunk, heads, x = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in TASKS), torch.randn(3, 6)
    results = []
    for balanced in (False, True):
        z = trunk(x)
        z.retain_grad()
        losses = {task: (h(z) - k).square().mean() for k, (task, h) in enumerate(zip(TASKS, heads, strict=True))}
        if balanced:
            Balancer(TASKS, gradient=ones, **way).backward(losses, shared=trunk.parameters(), features=z)
        else:
            sum(losses.values()).backward()
        results.append(z.grad)
    torch.testing.assert_close(*results)
