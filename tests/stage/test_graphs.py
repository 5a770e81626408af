import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import balance
from balance import Balancer
from balance.profiling import peak_memory
from tests.stage.kinds import TASKS, ones


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


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=pytest.mark.slow) for order in ("together", "losses first", "kept")]
)
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
