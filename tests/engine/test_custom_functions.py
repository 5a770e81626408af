"""Graphs that cannot be walked once for each task: each works, or an error names the cause and the remedy."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import balance
from balance import Balancer, Splitter

REMEDY = r"balance\.Splitter"


class Reversible(torch.autograd.Function):
    """Accumulates its parameters' gradients in its own backward pass."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.x, ctx.module = x.detach(), module
        with torch.no_grad():
            return x + module(x)

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            (x + ctx.module(x)).backward(g)
        return x.grad, None


class Freeing(torch.autograd.Function):
    """Frees what it needs in its first backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = torch.ones(()) * 2
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        factor, ctx.factor = ctx.factor, None
        return g * factor.item()


class Overwriting(torch.autograd.Function):
    """Changes what it has saved, as in-place activations do: a second pass is wrong without an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.exp()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx, g):
        result = g * ctx.y
        ctx.y.mul_(0.5)
        return result


class Plain(torch.autograd.Function):
    """Gradient reversal, an ordinary custom Function."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Network(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.first, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 2)})
        self.operation = operation

    def forward(self, x):
        return self.operation(self.first(x), self.inner)

    def losses(self, z):
        if isinstance(z, torch.Tensor):
            z = dict.fromkeys(self.heads, z)
        return {task: (head(z[task]) - k).square().mean() for k, (task, head) in enumerate(self.heads.items())}

    def shared(self):
        return [*self.first.parameters(), *self.inner.parameters()]


OPERATIONS = {
    "accumulates": (Reversible.apply, lambda y, inner: y + inner(y), "adds to .grad of parameters"),
    "frees": (lambda y, inner: Freeing.apply(inner(y)), lambda y, inner: 2 * inner(y), "can be walked only once"),
    "overwrites": (lambda y, inner: Overwriting.apply(inner(y)), lambda y, inner: inner(y).exp(), "found other gradients"),
    "reentrant": (
        lambda y, inner: checkpoint(inner, y, use_reentrant=True),
        lambda y, inner: inner(y),
        "Set use_reentrant=False",
    ),
}


def network(operation):
    torch.manual_seed(0)
    return Network(operation), torch.randn(5, 6)


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("with_grad", [False, True], ids=["", "accumulating"])
@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_graph_that_cannot_be_walked_for_each_task_is_refused_without_a_change_of_grad(name, memory, with_grad):
    operation, _, cause = OPERATIONS[name]
    model, x = network(operation)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if with_grad else None
    before = grads(model)
    balancer = Balancer(("a", "b"), gradient="mgda", loss="go4align", memory=memory)
    with pytest.raises(RuntimeError, match=f"{cause}.*{REMEDY}"):
        balancer.backward(model.losses(model(x)), shared=model.shared())
    torch.testing.assert_close(grads(model), before, rtol=0, atol=0)
    assert balancer.loss_balancer.rule.cumulative_losses.tolist() == [0, 0]


@pytest.mark.parametrize("gradient", ["mgda", "pcgrad", "graddrop"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_remedies_of_the_messages_work(name, gradient):
    operation, plain, _ = OPERATIONS[name]
    results = []
    for how in (plain, operation):
        model, x = network(how)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        z = model(x)
        Balancer(("a", "b"), gradient=gradient, source="features").backward(model.losses(z), shared=model.shared(), features=z)
        results.append(grads(model))
    torch.testing.assert_close(results[1], results[0])
    model, x = network(operation)
    sum(model.losses(Splitter(("a", "b"), gradient=gradient)(model(x))).values()).backward()
    torch.testing.assert_close([g + 1 for g in grads(model)[:4]], results[0][:4])


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_reused_weights_at_features_run_one_ordinary_pass(name, heads):
    operation, plain, _ = OPERATIONS[name]
    results = []
    for how in (plain, operation):
        model, x = network(how)
        rule = balance.compose.every(3, "mgda", 2)
        stage = Balancer(("a", "b"), gradient=rule, source="features", heads=heads)
        for _ in range(2):
            model.zero_grad()
            z = model(x)
            report = stage.backward(model.losses(z), shared=model.shared(), features=z)
        assert report.gramian is None
        results.append(grads(model))
    torch.testing.assert_close(results[1], results[0])


def test_accumulation_into_parameters_outside_shared_is_refused():
    """The block's own parameters are in no graph, and here not in shared either."""
    model, x = network(OPERATIONS["accumulates"][0])
    model.inner.weight.grad = before = torch.ones(8, 8)
    with pytest.raises(RuntimeError, match=r"Reversible.* adds to \.grad"):
        Balancer(("a", "b"), gradient="mgda").backward(model.losses(model(x)), shared=model.first.parameters())
    assert model.inner.weight.grad is before
    assert model.inner.bias.grad is None


def test_nan_in_an_ordinary_pass_does_not_change_grad():
    model, x = network(OPERATIONS["accumulates"][0])
    model.inner.register_full_backward_hook(lambda module, inputs, outputs: tuple(g * torch.nan for g in inputs))
    model.first.weight.grad = before = torch.ones(8, 6)
    z = model(x)
    with pytest.raises(ValueError, match="Gradients must be finite"):
        Balancer(("a", "b"), gradient="mgda", source="features").backward(model.losses(z), shared=model.shared(), features=z)
    assert model.first.weight.grad is before
    assert before.unique().tolist() == [1]


def test_custom_function_is_checked_by_two_passes_at_the_first_step_only():
    model, x = network(lambda y, inner: Plain.apply(inner(y)))
    calls = []
    backward = Plain.backward

    def counted(ctx, g):
        calls.append(0)
        return backward(ctx, g)

    Plain.backward = staticmethod(counted)
    try:
        balancer = Balancer(("a", "b"), gradient="mgda")
        for expected in (4, 2, 2):
            calls.clear()
            balancer.backward(model.losses(model(x)), shared=model.shared())
            assert len(calls) == expected
    finally:
        Plain.backward = staticmethod(backward)


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_step_does_not_trace_the_stage():
    for options in ({}, {"engine": "batched"}):
        torch._dynamo.reset()
        model, x = network(lambda y, inner: inner(y.relu()))
        balancer = Balancer(("a", "b"), gradient="mgda", **options)

        def step(x, model=model, balancer=balancer):
            z = model(x)
            balancer.backward(model.losses(z), shared=model.shared(), features=z)

        torch.compile(step, backend="aot_eager")(x)
        compiled = grads(model)
        model.zero_grad()
        step(x)
        torch.testing.assert_close(compiled, grads(model))


COMPILED = """
import warnings; warnings.simplefilter("ignore")
import re, torch, torch._functorch.config, torch._inductor.config
from torch import nn
from balance import Balancer
torch._inductor.config.force_disable_caches = True
torch.manual_seed(0)
trunk = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))])
heads, x = nn.ModuleList(nn.Linear(64, 1) for _ in range(3)), torch.randn(16, 64)

def step(run, balancer):
    trunk.zero_grad()
    z = run(x)
    losses = {str(k): (h(z) - k).square().mean() for k, h in enumerate(heads)}
    balancer.backward(losses, shared=trunk.parameters(), features=z)
    return [p.grad.clone() for p in trunk.parameters()]

def compiled():
    torch._dynamo.reset()
    run = torch.compile(trunk)
    run(x).sum().backward()  # which decides that buffers are donated
    trunk.zero_grad()
    return run

run = compiled()
for options in ({}, {"engine": "batched"}, {"memory": "gramian"}):
    try:
        step(run, Balancer(3, gradient="mgda", **options))
    except RuntimeError as error:
        assert re.search(r"donated buffers.*donated_buffer = False.*balance\\.Splitter", str(error)), error
        assert all(p.grad is None for p in trunk.parameters())
        print("refused")
features = Balancer(3, gradient="mgda", source="features")
torch.testing.assert_close(step(run, features), step(trunk, features), rtol=1e-4, atol=1e-6)
torch._functorch.config.donated_buffer = False
run, parameters = compiled(), Balancer(3, gradient="mgda")
torch.testing.assert_close(step(run, parameters), step(trunk, parameters), rtol=1e-4, atol=1e-6)
print("done")
"""


@pytest.mark.slow
def test_compiled_functions_with_donated_buffers():
    """In a separate process: the compiler's settings outlive a test."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["refused"] * 3 + ["done"], done.stdout + done.stderr


def test_plain_step_takes_any_graph():
    model, x = network(OPERATIONS["overwrites"][0])
    Balancer(("a", "b"), loss="uw").backward(model.losses(model(x)))
    assert model.first.weight.grad is not None
