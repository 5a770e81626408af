"""The engines: whatever way the gradients are had, they are the same; and what each way promises."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import balance
from balance import Balancer
from balance.engine.engine import Engine
from balance.engine.graph import trace
from balance.engine.layers import is_cheaper, layers, measured_tensors
from balance.engine.partition import partition_graph
from balance.profiling import peak_memory

TASKS = ("a", "b", "c")


def named(losses):
    return dict(zip(TASKS, losses, strict=True))


class Shared(nn.Module):
    """A trunk, a head for each task, and a parameter that two heads use."""

    def __init__(self, trunk, x, width, num_tasks=3):
        super().__init__()
        self.trunk, self.x = trunk, x
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(num_tasks))
        self.common = nn.Linear(3, 3)
        self.register_buffer("targets", torch.randn(num_tasks, len(x), 3))

    def losses(self):
        torch.manual_seed(7)  # the same dropout in every pass
        z = self.trunk(self.x)
        outputs = [head(z) for head in self.heads]
        outputs[:2] = [self.common(output).tanh() for output in outputs[:2]]
        return z, [
            (k + 1) * (output - t).square().mean() for k, (output, t) in enumerate(zip(outputs, self.targets, strict=True))
        ]


def block(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(2, outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = block(width, width, 1)

    def forward(self, x):
        return (x + self.body(x)).relu()


class Encoder(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=True) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=1)


def mlp():
    layers = [m for _ in range(4) for m in (nn.Linear(24, 24), nn.ReLU())]
    return Shared(nn.Sequential(*layers, nn.Dropout(0.3)), torch.randn(6, 24), 24)


def convolutional():
    trunk = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1), nn.ReLU(), nn.Conv2d(16, 16, (1, 3), padding="same")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return Shared(trunk, torch.randn(3, 2, 8, 8), 16)


def resnet():
    trunk = nn.Sequential(block(3, 8, 1), Residual(8), block(8, 32, 2), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Shared(trunk, torch.randn(2, 3, 6, 6), 32)


def transformer():
    return Shared(Encoder(16, dropout=0.1), torch.randn(2, 3, 16), 16)


def frozen():
    network = mlp()
    network.trunk[2].weight.requires_grad_(False)
    network.trunk[4].bias.requires_grad_(False)
    network.trunk.unused = nn.Linear(3, 3)
    network.trunk.register_module("unused", nn.Linear(3, 3))
    network.trunk.forward = lambda x: nn.Sequential.forward(network.trunk[:9], x)
    return network


NETWORKS = {f.__name__: f for f in (mlp, convolutional, resnet, transformer, frozen)}


def network(name, dtype=torch.float64):
    torch.manual_seed(0)
    found = NETWORKS[name]().to(dtype)
    found.x = found.x.to(dtype)
    return found


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def reference(model, weights=None):
    """The Gramian and the gradients of a step, by the definition: one gradient a task, put together as a matrix."""
    model.zero_grad()
    parameters = [p for p in model.parameters() if p.requires_grad]
    trunk = {id(p) for p in model.trunk.parameters()}
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = [torch.autograd.grad(loss, parameters, **options) for loss in model.losses()[1]]
    J = torch.stack(
        [torch.cat([g.flatten() for p, g in zip(parameters, row, strict=True) if id(p) in trunk]) for row in rows]
    ).double()
    w = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    found = {}
    for i, (name, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
        factors = w if id(parameter) in trunk else torch.ones_like(w)
        found[name] = sum(f * row[i].double() for f, row in zip(factors, rows, strict=True))
    return J @ J.T, found


def assert_close(model, expected, **tolerance):
    for name, gradient in grads(model).items():
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), expected[name], **tolerance)
        else:
            assert name not in expected or expected[name].abs().max() == 0


def in_proportion(gramian):
    """A rule whose weights depend on every entry of the Gramian."""
    return 1 + gramian.sum(dim=1) / gramian.trace()


WAYS = [{"engine": engine, "memory": memory} for engine in ("loop", "batched", "auto") for memory in ("jacobian", "gramian")]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@pytest.mark.parametrize("hint", [False, True], ids=["", "features"])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_are_the_definition(name, hint, way):
    model = network(name)
    G, _ = reference(model)
    _, expected = reference(model, in_proportion(G))
    model.zero_grad()
    balancer = Balancer(TASKS, gradient=in_proportion, heads="unweighted", **way)
    z, losses = model.losses()
    report = balancer.backward(named(losses), shared=model.trunk.parameters(), features=z if hint else None)
    torch.testing.assert_close(report.gramian, G, rtol=1e-10, atol=1e-14)
    assert_close(model, expected, rtol=1e-9, atol=1e-13)
    for parameter in model.parameters():
        assert parameter.requires_grad or parameter.grad is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer"])
def test_all_ways_agree_in_single_precision(name):
    results = []
    for way in WAYS:
        model = network(name, torch.float32)
        z, losses = model.losses()
        report = Balancer(TASKS, gradient="imtl", **way).backward(named(losses), shared=model.trunk.parameters(), features=z)
        results.append((report.gramian, grads(model)))
    for gramian, gradients in results[1:]:
        torch.testing.assert_close(gramian, results[0][0], rtol=2e-5, atol=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][parameter], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_torchjd(name, memory):
    torchjd = pytest.importorskip("torchjd")
    from torchjd.aggregation import IMTLG
    from torchjd.autojac import jac_to_grad, mtl_backward

    assert torchjd is not None
    model, other = network(name), network(name)
    z, losses = model.losses()
    Balancer(TASKS, gradient="imtl", heads="unweighted", memory=memory).backward(
        named(losses), shared=model.trunk.parameters(), features=z
    )
    z, losses = other.losses()
    reached = [p for p in other.trunk.parameters() if p.requires_grad]
    reached = [p for p in reached if id(p) in {id(leaf) for leaf in trace(losses).leaves}]
    own = [[*head.parameters(), *(other.common.parameters() if k < 2 else ())] for k, head in enumerate(other.heads)]
    mtl_backward(losses, features=z, shared_params=reached, tasks_params=own)
    jac_to_grad(reached, IMTLG())
    theirs = grads(other)
    for parameter, gradient in grads(model).items():
        if gradient is None:
            assert theirs[parameter] is None
        else:
            torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-7, atol=1e-12)


def thin(width=64, batch=3):
    """A layer whose weight is much larger than its batch, so that its gradients are worth shortening."""
    layer = nn.Linear(width, width)
    return layer, torch.randn(batch, width)


def rows(losses, parameters):
    found = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True) for loss in losses
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


def two_losses(y):
    return many_losses(y, 2)


def many_losses(y, num_tasks):
    torch.manual_seed(1)
    return [(y * torch.randn_like(y)).sum() if k % 2 else (y * torch.randn_like(y)).square().sum() for k in range(num_tasks)]


CONVOLUTIONS = {
    "stride": nn.Conv2d(32, 24, 3, stride=2),
    "dilation": nn.Conv2d(32, 24, 3, padding=2, dilation=2),
    "unequal": nn.Conv2d(32, 24, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
    "point": nn.Conv2d(64, 24, 1, bias=False),
    "no padding": nn.Conv2d(32, 24, 5),
    "same": nn.Conv2d(32, 24, (3, 5), padding="same"),
    "circular": nn.Conv2d(32, 24, 3, padding=1, padding_mode="circular"),
}


def check_layer(parameter, losses, memory):
    """A step on one parameter that is had through its layer."""
    (found,) = layers(trace(losses), [parameter]).values()
    assert is_cheaper(found, len(losses))
    J = rows(losses, [parameter]).double()
    G = J @ J.T
    balancer = Balancer(len(losses), gradient=in_proportion, memory=memory)
    report = balancer.backward(torch.stack(losses), shared=[parameter])
    assert (report.gramian - G).abs().max() <= 1e-6 * G.diagonal().max()
    expected = (in_proportion(G) @ J).view_as(parameter)
    assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
    return found


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_through_the_gradients_of_their_outputs(name, memory):
    convolution = copy.deepcopy(CONVOLUTIONS[name])
    x = torch.randn(1, convolution.in_channels, 5, 6, requires_grad=True)
    check_layer(convolution.weight, many_losses(convolution(x).tanh(), 20), memory)


def test_near_a_stationary_point_short_rows_are_as_exact_as_long_ones():
    """Two gradients that nearly cancel: what is left must not drown in rounding of their inner products."""
    layer, x = thin()
    y = layer(x)
    target = torch.randn_like(y)
    shift = 1e-4 * torch.randn_like(y)
    losses = {"0": (y * target).sum(), "1": -(y * (target + shift)).sum()}
    J = rows(losses.values(), list(layer.parameters())).double()
    report = Balancer(2, gradient="mgda", memory="gramian").backward(losses, shared=layer.parameters())
    left = float(report.gramian.sum())
    assert left == pytest.approx(float(J.sum(dim=0).square().sum()), rel=1e-2)
    assert 1e-9 < left / float(report.gramian.trace()) < 1e-7


def tied(layer, x):
    return layer(layer(x).relu())


def hooked(layer, x):
    transposed = layer.weight.T
    transposed.register_hook(lambda gradient: 2 * gradient)
    return torch.addmm(layer.bias, x, transposed)


def scaled(layer, x):
    return torch.addmm(layer.bias, x, layer.weight.T, alpha=3.0)


def penalised(layer, x):
    return layer(x) + layer.weight.square().sum()


def computed(layer, x):
    return functional.linear(x, layer.weight.tanh(), layer.bias)


def two_places(layer, x):
    return layer(x) @ layer.weight


@pytest.mark.parametrize("use", [tied, hooked, scaled, penalised, computed, two_places])
def test_what_is_no_plain_layer_is_not_taken_for_one(use):
    layer, x = thin()
    losses = two_losses(use(layer, x))
    assert not layers(trace(losses), [layer.weight])
    J = rows(losses, [layer.weight, layer.bias]).double()
    report = Balancer(2, gradient="mgda", memory="gramian").backward(torch.stack(losses), shared=layer.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv3d(8, 8, 1)]
)
def test_other_convolutions_are_had_in_full(convolution):
    convolution = copy.deepcopy(convolution)
    shape = {nn.Conv1d: (1, 8, 5), nn.Conv3d: (1, 8, 2, 2, 2)}.get(type(convolution), (1, 8, 5, 5))
    losses = two_losses(convolution(torch.randn(shape)))
    assert not layers(trace(losses), [convolution.weight])
    J = rows(losses, [convolution.weight, convolution.bias]).double()
    report = Balancer(2, gradient="mgda", memory="gramian").backward(torch.stack(losses), shared=convolution.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("without", ["nothing", "bias", "transposition", "two dimensions", "square"])
def test_plain_layers_are_found_in_all_their_forms(without, memory):
    layer, x = thin()
    if without == "square":
        layer = nn.Linear(64, 48)
    x.requires_grad_()
    if without == "bias":
        y = functional.linear(x, layer.weight)
    elif without == "transposition":
        y = x @ layer.weight
    else:
        y = layer(x[None])[0] if without == "two dimensions" else layer(x)
    found = check_layer(layer.weight, many_losses(y.tanh(), 8), memory)
    assert (found.samples, found.width, found.outputs) == (3, 64, len(layer.bias))


def test_a_transposed_weight_that_nobody_can_inspect_is_had_in_full():
    """Where the layer's input needs no gradient, torch does not save the transposed weight, so a hook on it could be hidden."""
    layer, x = thin()
    losses = many_losses(layer(x).tanh(), 8)
    assert not layers(trace(losses), [layer.weight])
    assert layers(trace(many_losses((x @ layer.weight).tanh(), 8)), [layer.weight])


def test_heads_are_traversed_once_for_a_stack_of_losses():
    model = network("mlp")
    visits = []
    torch.manual_seed(7)
    z = model.trunk(model.x)
    outputs = [head(z) for head in model.heads]
    for k, output in enumerate(outputs):
        output.register_hook(lambda _, k=k: visits.append(k))
    losses = torch.stack([output.square().mean() for output in outputs])
    Balancer(TASKS, gradient="pcgrad").backward(losses, shared=model.trunk.parameters())
    assert visits[:3] == [0, 1, 2]
    assert len(visits) <= 6  # and once more in a weighted pass, if there is one


@pytest.mark.parametrize("hint", [False, True])
def test_a_stack_of_losses_is_what_a_dict_is(hint):
    results = []
    for form in (dict, torch.stack):
        model = network("mlp")
        z, losses = model.losses()
        losses = named(losses) if form is dict else torch.stack(losses)
        Balancer(TASKS, gradient="pcgrad", loss="uw").backward(
            losses, shared=model.trunk.parameters(), features=z if hint else None
        )
        results.append(grads(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=0, atol=0)


def test_a_stack_with_constants_and_other_types_is_read_as_well():
    layer, x = thin()
    first = layer(x).sum()
    mixed = torch.stack([first, first.double() ** 2, torch.tensor(1.0)])
    report = Balancer(3, gradient="mgda").backward(mixed, shared=layer.parameters())
    assert report.gramian[2].abs().max() == 0
    assert report.gramian[1, 1] > 0


def test_a_hook_on_the_stack_is_heard():
    layer, x = thin()
    losses = torch.stack(two_losses(layer(x)))
    losses.register_hook(lambda gradient: 2 * gradient)
    J = rows(list(losses.unbind()), [layer.weight, layer.bias]).double()
    report = Balancer(2, gradient="mgda").backward(losses, shared=layer.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-5, atol=1e-5)


class Opaque(torch.autograd.Function):
    """An operation whose backward looks at numbers, as no batched pass can."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 if float(gradient.sum()) > -1e9 else 0.0)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
def test_what_cannot_be_batched_is_done_one_by_one_with_one_warning(memory):
    results = []
    for engine in ("loop", "batched"):
        torch.manual_seed(0)
        layer, x = thin()
        balancer = Balancer(2, gradient="mgda", engine=engine, memory=memory)
        for step in range(2):
            layer.zero_grad()
            z = Opaque.apply(layer(x))
            arguments = {"shared": layer.parameters(), "features": z}
            if engine == "batched" and step == 0:
                with pytest.warns(UserWarning, match="cannot be batched") as record:
                    balancer.backward(torch.stack(two_losses(z)), **arguments)
                assert [warning.filename for warning in record] == [__file__]
            else:
                balancer.backward(torch.stack(two_losses(z)), **arguments)
        results.append(layer.weight.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("hint", [False, True])
def test_the_graph_is_freed(engine, memory, hint):
    balancer = Balancer(TASKS, gradient="mgda", engine=engine, memory=memory)
    for _ in range(2):  # a batched engine keeps it once, until it knows that it can
        model = network("mlp")
        z, losses = model.losses()
        balancer.backward(named(losses), shared=model.trunk.parameters(), features=z if hint else None)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_graphs_of_separate_heads_are_freed_by_their_own_pass():
    torch.manual_seed(0)
    trunk, x = thin()
    heads = [nn.Linear(64, 64) for _ in TASKS]
    z = trunk(x)
    losses = {task: head(z).square().mean() for task, head in zip(TASKS, heads, strict=True)}
    Balancer(TASKS, gradient="mgda", source="features").backward(losses, features=z)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


class Wide(nn.Module):
    """Layers that are large beside their batch of activations."""

    def __init__(self, num_layers=6, width=320, batch=200, num_tasks=8):
        super().__init__()
        self.trunk = nn.Sequential(*(m for _ in range(num_layers) for m in (nn.Linear(width, width), nn.Tanh())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))
        self.x = torch.randn(batch, width)

    def losses(self):
        z = self.trunk(self.x)
        return z, {str(k): head(z).square().mean() for k, head in enumerate(self.heads)}


def extra_memory(model, balancer, hint, **arguments):
    shared = list(model.trunk.parameters())

    def plain():
        torch.stack(list(model.losses()[1].values())).sum().backward()

    def step():
        z, losses = model.losses()
        balancer.backward(losses, shared=shared, features=z if hint else None, **arguments)

    found = []
    for run in (plain, step, step):
        model.zero_grad()
        found.append(peak_memory(run))
    return found[-1] - found[0]


@pytest.mark.parametrize("batch", [20, 200], ids=["short", "full"])
@pytest.mark.parametrize("hint", [False, True], ids=["", "features"])
@pytest.mark.parametrize(("options", "limit"), [({"memory": "jacobian"}, 1.1), ({"memory": "gramian"}, 0.5)])
def test_memory(batch, hint, options, limit):
    model = Wide(batch=batch)
    shared = list(model.trunk.parameters())
    balancer = Balancer(8, gradient="imtl", engine="loop", **options)
    estimate = balancer.estimate(shared)
    jacobian = 8 * 4 * sum(p.numel() for p in shared)
    assert estimate.jacobian == jacobian
    assert estimate.gramian <= 0.4 * jacobian
    extra = extra_memory(model, balancer, hint)
    assert extra <= limit * jacobian
    assert extra <= 1.1 * estimate.bytes + 4 * 8 * 3 * batch * 320  # a few activations, should features be held
    if batch == 20:
        assert extra <= 0.3 * jacobian  # gradients of the layers' outputs are shorter


def test_an_estimate_needs_no_step():
    model = Wide()
    shared = list(model.trunk.parameters())
    assert Balancer(8).estimate(shared).bytes == 0
    z = torch.empty(200, 320)
    assert Balancer(8, gradient="mgda", source="features").estimate(features=z).bytes == 8 * 4 * 200 * 320
    part = Balancer(8, gradient="mgda").estimate(shared, measure=shared[-2:])
    assert part.bytes == 8 * 4 * (320 * 320 + 320)
    assert Balancer(8, gradient="mgda", memory="gramian").estimate(shared).bytes < 0.4 * part.bytes * 6 + 1


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="sees the Jacobian, which memory='gramian' does not keep"):
        Balancer(2, gradient="graddrop", memory="gramian")
    with pytest.raises(ValueError, match="engine"):
        Balancer(2, gradient="mgda", engine="vmap")
    with pytest.raises(ValueError, match="memory"):
        Balancer(2, gradient="mgda", memory="little")
    model = network("mlp")
    z, losses = model.losses()
    losses = named(losses)
    last = list(model.trunk[6].parameters())
    with pytest.raises(ValueError, match="measure is for rules that give weights"):
        Balancer(TASKS, gradient="graddrop").backward(losses, shared=model.trunk.parameters(), measure=last)
    with pytest.raises(ValueError, match='measure is for source="parameters"'):
        Balancer(TASKS, gradient="mgda", source="features").backward(losses, features=z, measure=last)
    with pytest.raises(ValueError, match="of its 2 that require a gradient 0 are in shared"):
        Balancer(TASKS, gradient="mgda").backward(losses, shared=model.trunk.parameters(), measure=model.heads[0].parameters())
    with pytest.raises(ValueError, match="measure must hold parameters, but is empty"):
        Balancer(TASKS, gradient="mgda").backward(losses, shared=model.trunk.parameters(), measure=[])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("hint", [False, True])
def test_measuring_on_a_part_weighs_the_whole(engine, hint):
    model = network("mlp")
    last = list(model.trunk[6].parameters())
    losses = model.losses()[1]
    J = rows(losses, last)
    weights = in_proportion(J @ J.T)
    _, expected = reference(model, weights)
    model.zero_grad()
    visits = []

    def watch(module, inputs, output):
        output.register_hook(lambda _: visits.append(0))

    watched = model.trunk[0].register_forward_hook(watch)
    z, losses = model.losses()
    report = Balancer(TASKS, gradient=in_proportion, heads="unweighted", engine=engine).backward(
        named(losses), shared=model.trunk.parameters(), features=z if hint else None, measure=last
    )
    watched.remove()
    torch.testing.assert_close(report.gramian, J @ J.T)
    assert_close(model, expected)
    assert visits == [0]  # the passes of the tasks stopped before


def test_measuring_on_everything_is_the_exact_step():
    results = []
    for measure in (False, True):
        model = network("resnet")
        _, losses = model.losses()
        shared = list(model.trunk.parameters())
        Balancer(TASKS, gradient="nashmtl").backward(named(losses), shared=shared, **({"measure": shared} if measure else {}))
        results.append(grads(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-8, atol=1e-12)


def test_accumulation_and_scaler_with_every_form():
    """Two steps add up, and a scale factor passes through."""
    for memory in ("jacobian", "gramian"):
        model = network("mlp")
        shared = list(model.trunk.parameters())
        balancer = Balancer(TASKS, gradient="pcgrad", memory=memory, seed=1)
        balancer.backward(named(model.losses()[1]), shared=shared)
        once = grads(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        balancer = Balancer(TASKS, gradient="pcgrad", memory=memory, seed=1)
        balancer.backward(named(model.losses()[1]), shared=shared, scaler=scaler)
        for name, gradient in grads(model).items():
            torch.testing.assert_close(gradient, 9 * once[name])


def nested(model):
    """Features of which one is computed from the other."""
    torch.manual_seed(7)
    first = model.trunk[:4](model.x)
    second = model.trunk[4:](first)
    outputs = [head(first if k == 0 else second) for k, head in enumerate(model.heads)]
    return [first, second], named([output.square().mean() for output in outputs])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_a_hint_that_is_none_changes_nothing(way):
    """Features computed from one another, or that some path goes around, are not where passes can begin."""
    for make in (nested, lambda model: (nested(model)[0][1], nested(model)[1])):
        results = []
        for hint in (False, True):
            model = network("mlp")
            z, losses = make(model) if hint else nested(model)
            if hint and not isinstance(z, list):
                torch.manual_seed(7)
                z, losses = nested(model)
                z = z[1]
            Balancer(TASKS, gradient=in_proportion, heads="weighted", **way).backward(
                losses, shared=model.trunk.parameters(), features=z if hint else None
            )
            results.append(grads(model))
        for name, gradient in results[0].items():
            if gradient is None:
                assert results[1][name] is None
            else:
                torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-13)


def test_features_that_differ_between_tasks():
    """Every task may use some of the features only; the direction is that of the weighted losses."""
    model = network("mlp")
    torch.manual_seed(7)
    z = model.trunk(model.x)
    features = {"low": z[:, :12] + 0, "high": {"one": z[:, 12:] + 0}}
    low, high = features["low"], features["high"]["one"]
    losses = {"a": low.square().mean(), "b": high.sin().mean(), "c": (low * high).mean()}
    parts = [torch.autograd.grad(loss, [low, high], retain_graph=True, materialize_grads=True) for loss in losses.values()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in parts])
    weights = in_proportion(J @ J.T)
    expected = torch.autograd.grad(
        sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)), model.trunk[0].weight, retain_graph=True
    )
    balancer = Balancer(TASKS, gradient=in_proportion, source="features")
    report = balancer.backward(losses, features=features)
    torch.testing.assert_close(report.gramian, J @ J.T)
    torch.testing.assert_close(model.trunk[0].weight.grad, expected[0])


def test_features_that_a_path_goes_around():
    """With weights the step is still that of the weighted losses; a direction of the features cannot be."""
    model = network("mlp")
    torch.manual_seed(7)
    first = model.trunk[:4](model.x)
    z = model.trunk[4:](first)
    losses = {"a": z.square().mean(), "b": z.sin().mean() + first.mean(), "c": z.mean()}
    with pytest.raises(ValueError, match="needs every path"):
        Balancer(TASKS, gradient="graddrop", source="features").backward(losses, features=z)
    expected = torch.autograd.grad(sum(losses.values()), model.trunk[0].weight, retain_graph=True)[0]
    Balancer(TASKS, gradient=lambda G: torch.ones(3), source="features").backward(losses, features=z)
    torch.testing.assert_close(model.trunk[0].weight.grad, expected)


def test_the_jacobian_is_handed_over_without_a_copy(monkeypatch):
    model = Wide(batch=200)
    seen = []

    def rule(jacobian):
        seen.append(jacobian)
        return jacobian.sum(dim=0)

    monkeypatch.setattr(balance.gradient_balancers, "build", lambda *_, **__: rule)
    balancer = Balancer(8, gradient="graddrop")
    extra = extra_memory(model, balancer, hint=False)
    J = seen[-1]
    assert extra <= 1.4 * J.numel() * 4  # with the direction itself, and what the rule does
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(sum(model.losses()[1].values()), list(model.trunk.parameters()))]
    )
    torch.testing.assert_close(J.sum(dim=0), expected, rtol=1e-4, atol=1e-6)


def test_layers_are_read_where_it_pays():
    found = {}
    for batch in (8, 400):
        model = Wide(batch=batch)
        losses = model.losses()[1]
        parts = partition_graph("parameters", list(losses.values()), model.trunk.parameters(), None, None, [])
        found[batch] = [tensor.layer is not None for tensor in measured_tensors(parts.lower_graph, parts.inputs, 8)]
    assert found == {8: [False, False] + [True, False] * 5, 400: [False] * 12}  # weights and biases


def test_automatic_choice_of_the_engine():
    """Batched on an accelerator, if features are given and the trunk has more parameters than activations."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for batch, hint, device, expected in [
        (20, True, cuda, True),
        (20, False, cuda, False),
        (20, True, cpu, False),
        (2000, True, cuda, False),
    ]:
        model = Wide(batch=batch)
        z, losses = model.losses()
        parts = partition_graph("parameters", list(losses.values()), model.trunk.parameters(), z if hint else None, None, [])
        assert Engine("auto", "jacobian")._is_batched(parts, device) == expected
        assert Engine("batched", "jacobian")._is_batched(parts, device)
        assert not Engine("loop", "jacobian")._is_batched(parts, device)


def test_no_warnings_in_a_batched_pass_of_plain_layers():
    model = network("mlp")
    z, losses = model.losses()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Balancer(TASKS, gradient="mgda", engine="batched").backward(named(losses), shared=model.trunk.parameters(), features=z)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_checkpointed_and_compiled_trunks(how, way):
    """What a graph holds may be computed again, or hidden in one node."""
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        trunk, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
        heads = [nn.Linear(64, 2) for _ in TASKS]
        if not wrap:
            z = trunk(x)
        elif how == "checkpoint":
            z = checkpoint(trunk, x, use_reentrant=False)
        else:
            z = torch.compile(trunk, backend="aot_eager")(x)
        losses = named([(k + 1) * head(z).square().mean() for k, head in enumerate(heads)])
        Balancer(TASKS, gradient="imtl", **way).backward(losses, shared=trunk.parameters(), features=z)
        results.append([p.grad for module in (trunk, *heads) for p in module.parameters()])
    for plain, wrapped in zip(*results, strict=True):
        torch.testing.assert_close(wrapped, plain)


def test_loss_rules_that_cannot_be_batched_are_differentiated_row_by_row():
    def rule(losses):
        return Opaque.apply(losses) * torch.arange(1.0, 4.0)

    theta = torch.ones(3, requires_grad=True)
    report = Balancer(3, loss=rule, gradient="mgda").backward(theta * torch.tensor([1.0, 2.0, 3.0]), shared=[theta])
    torch.testing.assert_close(report.loss_weights, torch.arange(1.0, 4.0))
