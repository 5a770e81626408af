"""A hook inside the graph acts once in the pass of each task, a hook on a parameter once on the final gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from balance import Balancer

TASKS = ("a", "b", "c")
WAYS = {
    f"{engine}-{memory}-{source}{'-hint' if hint else ''}": (
        {"engine": engine, "memory": memory, "source": source},
        hint,
    )
    for engine in ("loop", "batched")
    for memory in ("jacobian", "gramian")
    for source, hint in (("parameters", False), ("parameters", True), ("features", True))
}


def ones(gramian):
    return torch.ones(len(gramian), dtype=gramian.dtype)


def uneven(gramian):
    return torch.arange(1.0, len(gramian) + 1, dtype=gramian.dtype)


class Network(nn.Module):
    """A trunk whose second layer is much larger than its batch, so that its weight can be computed from its input."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 40), nn.Linear(40, 60)
        self.heads = nn.ModuleList(nn.Linear(60, 2) for _ in TASKS)
        self.calls = []

    def hooked(self, tensor, factor):
        def hook(gradient):
            self.calls.append(factor)
            return factor * gradient

        tensor.register_hook(hook)
        return tensor

    def forward(self, x, place):
        hidden = self.low(x).tanh()
        if place == "hidden":
            self.hooked(hidden, -0.1)
        weight = self.high.weight.t()
        if place == "transposed weight":
            self.hooked(weight, 0.0)
        y = torch.addmm(self.high.bias, hidden, weight)
        if place == "output of the layer":
            self.hooked(y, -0.1)
        if place == "node":
            y.grad_fn.register_prehook(lambda gradients: (0.5 * gradients[0],))
        if place == "inputs of the node":
            y.grad_fn.register_hook(lambda inputs, _: tuple(None if g is None else 3 * g for g in inputs))
        z = y.tanh()
        if place == "features":
            self.hooked(z, 0.1)
        return z

    def losses(self, x, place):
        z = self(x, place)
        return z, {task: (head(z) - k).square().mean() for k, (task, head) in enumerate(zip(TASKS, self.heads, strict=True))}


def build(place):
    torch.manual_seed(0)
    network = Network().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    if place == "module":
        network.high.register_full_backward_hook(lambda module, inputs, outputs: tuple(0.3 * g for g in inputs))
        network.forward = lambda x, _: network.high(network.low(x).tanh()).tanh()
    if place == "parameter":
        network.high.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        network.heads[0].weight.register_hook(lambda gradient: 2 * gradient)
    return network, x


def shared_of(network):
    return [*network.low.parameters(), *network.high.parameters()]


def expected(place, weights, heads):
    """One gradient of each loss, without the hooks of parameters, which act on the sum."""
    network, x = build(place)
    leaf_hooks = {p: dict(p._backward_hooks) for p in network.parameters() if p._backward_hooks}
    for parameter in leaf_hooks:
        parameter._backward_hooks.clear()
    _, losses = network.losses(x, place)
    found = {}
    shared = {id(p) for p in shared_of(network)}
    for w, h, loss in zip(weights, heads, losses.values(), strict=True):
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, materialize_grads=True)
        for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
            found[name] = found.get(name, 0) + (w if id(parameter) in shared else h) * gradient
    for name, parameter in network.named_parameters():
        for hook in leaf_hooks.get(parameter, {}).values():
            found[name] = hook(found[name])
    return found


PLACES = [
    *("nothing", "hidden", "transposed weight", "output of the layer", "node", "inputs of the node", "features", "module"),
    "parameter",
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_act_once(place, way):
    options, hint = WAYS[way]
    want = expected(place, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    network, x = build(place)
    z, losses = network.losses(x, place)
    balancer = Balancer(TASKS, gradient=uneven, **options)
    balancer.backward(losses, shared=shared_of(network), features=z if hint else None)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", ["hidden", "output of the layer", "features"])
@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
def test_hook_inside_the_graph_is_called_once_per_pass(place, memory):
    network, x = build(place)
    _, losses = network.losses(x, place)
    Balancer(TASKS, gradient=ones, memory=memory).backward(losses, shared=shared_of(network))
    passes = 3 if memory == "jacobian" else len(network.calls)
    assert len(network.calls) == passes
    assert memory == "gramian" or passes == 3


@pytest.mark.parametrize("reuse", [1, 5])
@pytest.mark.parametrize("way", [{}, {"memory": "gramian"}, {"source": "features"}], ids=str)
def test_hooks_of_parameters_get_the_final_gradient_once(way, reuse):
    from balance import compose

    network, x = build("nothing")
    calls = []
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda g, name=name: calls.append(("tensor", name)))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(("accumulated", name)))
    balancer = Balancer(TASKS, gradient=compose.every(reuse, "mgda", 3), **way)
    for _ in range(2):
        calls.clear()
        z, losses = network.losses(x, "nothing")
        balancer.backward(losses, shared=shared_of(network), features=z)
        assert sorted(calls) == sorted(
            (kind, name) for kind in ("tensor", "accumulated") for name, _ in network.named_parameters()
        )


def test_clamp_on_a_parameter_bounds_the_final_gradient():
    for options in ({}, {"memory": "gramian"}, {"source": "features"}):
        torch.manual_seed(0)
        trunk, a, b = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16)), nn.Linear(16, 1), nn.Linear(16, 2)
        trunk[0].weight.register_hook(lambda g: g.clamp(-1e-4, 1e-4))
        z = trunk(torch.randn(8, 6))
        losses = {"a": a(z).square().mean(), "b": (b(z) - 1).square().mean()}
        Balancer(("a", "b"), gradient="pcgrad", **options).backward(losses, shared=trunk.parameters(), features=z)
        assert float(trunk[0].weight.grad.abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradient_reversal_by_a_hook_on_a_layers_output(kind):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32) if kind == "linear" else nn.Conv2d(64, 64, 3, padding=1)
    heads = nn.ModuleList(nn.Linear(32 if kind == "linear" else 64, 1) for _ in TASKS)
    x = torch.randn(4, 64, requires_grad=True) if kind == "linear" else torch.randn(2, 64, 4, 4)

    def losses():
        h = layer(x)
        h.register_hook(lambda g: -0.1 * g)
        z = h.tanh() if kind == "linear" else h.tanh().mean((2, 3))
        return {task: (head(z) - k).square().mean() for k, (task, head) in enumerate(zip(TASKS, heads, strict=True))}

    sum(losses().values()).backward()
    want = layer.weight.grad.clone(), layer.bias.grad.clone()
    layer.zero_grad()
    Balancer(TASKS, gradient=ones).backward(losses(), shared=layer.parameters())
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), want)


class Halve(torch.autograd.Function):
    """A Function whose node has attributes with the names of torch's own."""

    @staticmethod
    def forward(ctx, weight):
        ctx.variable, ctx.name, ctx.metadata_of = weight, "AddmmBackward0", None
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
def test_attributes_of_a_custom_function_have_no_meaning(memory):
    torch.manual_seed(0)
    W, x = nn.Parameter(torch.randn(60, 20)), torch.randn(3, 60)
    heads = nn.ModuleList(nn.Linear(20, 1) for _ in TASKS)

    def losses():
        return {task: (h(x @ Halve.apply(W)) - k).square().mean() for k, (task, h) in enumerate(zip(TASKS, heads, strict=True))}

    (want,) = torch.autograd.grad(sum(losses().values()), W)
    Balancer(TASKS, gradient=ones, memory=memory).backward(losses(), shared=[W])
    torch.testing.assert_close(W.grad, want)


def test_in_place_change_of_the_features_does_not_double_their_hooks():
    torch.manual_seed(0)
    trunk, heads, x = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in TASKS), torch.randn(3, 6)

    def losses():
        z = functional.linear(x, trunk.weight)
        z.register_hook(lambda g: 3 * g)
        z.add_(1)
        z.register_hook(lambda g: 0.5 * g)
        return z, {task: (h(z) - k).square().mean() for k, (task, h) in enumerate(zip(TASKS, heads, strict=True))}

    (want,) = torch.autograd.grad(sum(losses()[1].values()), trunk.weight)
    for options in ({}, {"source": "features"}, {"engine": "batched"}):
        trunk.zero_grad()
        z, found = losses()
        Balancer(TASKS, gradient=ones, **options).backward(found, shared=[trunk.weight], features=z)
        torch.testing.assert_close(trunk.weight.grad, want)
