"""One loss per sample: the Gramian and the gradients of one pass, against one pass for each sample."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from balance import Balancer
from balance.engine import engine, sample_gradients

CLASSES = 3
DENSE = ["linear", "free", "activation", "norm", "residual", "shared", "affine", "dropout"]
CONVOLUTIONAL = ["convolution", "stride", "groups", "norm", "activation", "pool", "shared", "residual", "batch"]


class Recorder:
    """Record of the steps: True for one pass."""

    def __init__(self, monkeypatch):
        self.taken = []
        self.measure = engine.measure_samples
        monkeypatch.setattr(engine, "measure_samples", self)
        self.allowed = True

    def __call__(self, *arguments, **options):
        result = self.measure(*arguments, **options) if self.allowed else None
        self.taken.append(result is not None)
        return result


@pytest.fixture(name="recorder")
def make_recorder(monkeypatch):
    return Recorder(monkeypatch)


def step(network, losses, *, shared=None, **options):
    """Return the report of a step and the gradients of all parameters; the network stays as it was."""
    network = copy.deepcopy(network)
    torch.manual_seed(1)  # of dropout
    arguments = {name: options.pop(name) for name in ("measure", "zero", "factor") if name in options}
    stage = {"zero": arguments.pop("zero")} if "zero" in arguments else {}
    if "measure" in arguments:
        arguments["measure"] = arguments["measure"](network)
    report = Balancer(None, **{"gradient": "mgda"} | options | stage).backward(
        losses(network), shared=list(network.parameters()) if shared is None else shared(network), **arguments
    )
    return report, [p.grad for p in network.parameters()]


def compare(recorder, network, losses, *, one_pass=True, **options):
    """Check that a step is the same with and without the single pass, and whether the single pass is taken."""
    recorder.allowed, recorder.taken = True, []
    report, gradients = step(network, losses, **options)
    assert recorder.taken == [one_pass]
    recorder.allowed = False
    expected, expected_gradients = step(network, losses, **options)
    scale = expected.gramian.diagonal().max()
    torch.testing.assert_close(report.gramian / scale, expected.gramian / scale, atol=1e-13, rtol=1e-11)
    assert report.tasks == expected.tasks
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other, atol=1e-11, rtol=1e-7)
    return report


def problem(inputs, count, *, labels=None):
    """Return losses of a network for fixed inputs of ``count`` samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(9, (count, *inputs), generator=generator) if labels == "words" else None
    x = torch.randn(count, *inputs, generator=generator, dtype=torch.float64) if x is None else x
    y = torch.randint(CLASSES, (count,), generator=generator)
    return lambda network: functional.cross_entropy(network(x), y, reduction="none")


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Affine(nn.Module):
    """A parameter of each kind of broadcast: added, subtracted, multiplied and expanded."""

    def __init__(self, *shape):
        super().__init__()
        self.shift, self.factor = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[-1:]))
        self.scalar, self.token = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.randn(1, *shape))

    def forward(self, x):
        x = torch.add(x, self.shift, alpha=2) * self.factor + self.token.expand(len(x), *self.token.shape[1:])
        return (self.factor - x) * self.scalar - self.shift


@st.composite
def dense_networks(draw):
    """Networks of linear layers over any number of further positions."""
    width = draw(st.integers(1, 5))
    positions = draw(st.lists(st.integers(1, 3), max_size=2))
    shared = nn.Linear(width, width)
    make = {
        "linear": lambda: nn.Linear(width, width),
        "free": lambda: nn.Linear(width, width, bias=False),
        "activation": nn.Tanh,
        "norm": lambda: nn.LayerNorm((*positions[-1:], width)),
        "residual": lambda: Residual(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))),
        "shared": lambda: shared,
        "affine": lambda: Affine(*positions, width),
        "dropout": lambda: nn.Dropout(0.3),
    }
    layers = [make[kind]() for kind in draw(st.lists(st.sampled_from(DENSE), max_size=5))]
    end = [nn.Flatten(), nn.Linear(width * torch.Size(positions).numel(), CLASSES)]
    return nn.Sequential(*layers, *end).double(), (*positions, width)


@st.composite
def convolutional_networks(draw):
    """Networks of convolutions in one, two or three dimensions."""
    dimensions, channels = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    convolution = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    size, layers = 7 if dimensions < 3 else 4, []
    for kind in draw(st.lists(st.sampled_from(CONVOLUTIONAL), max_size=4)):
        new = {
            "convolution": lambda: convolution(channels, channels, 3, padding=1, bias=draw(st.booleans())),
            "stride": lambda: convolution(channels, channels, 2, stride=2, padding=1, dilation=draw(st.integers(1, 2))),
            "groups": lambda: convolution(channels, channels, 3, padding=1, groups=2),
            "norm": lambda: nn.GroupNorm(2, channels),
            "activation": nn.ReLU,
            "pool": lambda: [nn.MaxPool1d, nn.MaxPool2d, nn.Identity][dimensions - 1](2, ceil_mode=True),
            "shared": lambda: nn.Sequential(*[convolution(channels, channels, 1)] * 2),
            "residual": lambda: Residual(convolution(channels, channels, 3, padding=1)),
            "batch": lambda: [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1](channels).eval(),
        }[kind]()
        layers.append(new)
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES)).double()
    inputs = (channels, *[size] * dimensions)
    network(torch.zeros(2, *inputs, dtype=torch.float64))
    return network, inputs


@given(dense_networks(), st.integers(2, 6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_dense_networks(case, count, by_matrices):
    with pytest.MonkeyPatch.context() as patch:
        if by_matrices:
            patch.setattr(sample_gradients, "_is_cheaper", lambda factors: False)
            patch.setattr(sample_gradients, "_limit", lambda tensor: 1)
        patch.setattr(sample_gradients, "_BLOCK", 2)
        compare(Recorder(patch), case[0], problem(case[1], count))


@given(convolutional_networks(), st.integers(2, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_convolutional_networks(case, count, in_parts):
    with pytest.MonkeyPatch.context() as patch:
        if in_parts:
            patch.setattr(sample_gradients, "_limit", lambda tensor: 1)
        compare(Recorder(patch), case[0], problem(case[1], count))


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers(recorder, batch_first):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4, padding_idx=2)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first, dropout=0.1)
            self.end = nn.Linear(4, CLASSES)

        def forward(self, x):
            z = self.words(x if batch_first else x.T)
            return self.end(self.layer(z).mean(1 if batch_first else 0))

    compare(recorder, Words().double(), problem((5,), 4, labels="words"))


def test_frames_of_videos_are_rows_of_one_sample(recorder):
    network = nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(network, nn.Linear(12, 4), nn.Unflatten(0, (-1, 3)), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    compare(recorder, network, problem((3, 2, 4, 4), 5))


def test_weights_that_two_kinds_of_layers_share(recorder):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            z = self.words(x).mean(1) @ self.matrix
            return functional.linear(z @ self.matrix, self.words.weight)[:, :CLASSES]

    compare(recorder, Tied().double(), problem((5,), 4, labels="words"))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "pcgrad"},
        {"gradient": "cagrad", "scale": "norm"},
        {"scale": "sum", "factor": 0.25},
        {"loss": "scaleinvls"},
        {"memory": "gramian"},
        {"engine": "batched"},
        {"measure": lambda network: network[2].parameters()},
        {"measure": lambda network: network[0].parameters(), "scale": "norm"},
        {"shared": lambda network: list(network[:3].parameters())},
        {"shared": lambda network: list(network[:3].parameters()), "heads": "unweighted"},
    ],
)
def test_options(recorder, options):
    compare(recorder, mlp(), problem((4,), 6), **options)


def test_single_samples_need_one_pass_anyway(recorder):
    compare(recorder, mlp(), problem((4,), 1), one_pass=False)


def test_samples_with_a_loss_of_zero_can_be_absent(recorder):
    losses = problem((4,), 6)
    keep = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    report = compare(recorder, mlp(), lambda network: losses(network) * keep, zero="absent")
    assert report.tasks == ("0", "2", "3", "5")


def hooked(kind):
    """Return losses of a network with Python code in the graph."""

    def losses(network):
        z = network[0](torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4))
        if kind == "tensor hook":
            z.register_hook(lambda g: g * 2)
        if kind == "tensor hook that only looks":
            z.register_hook(lambda g: print(g.norm(), file=io.StringIO()))
        if kind == "hook of a weight's transpose":
            weight = network[2].weight.t()
            weight.register_hook(lambda g: 3 * g)
            return (z @ weight.t()).sum(1)
        if kind == "node hook":
            z.grad_fn.register_prehook(lambda g: (g[0] * 2,))
        if kind == "checkpoint":
            z = checkpoint(network[2], z, use_reentrant=False)
        if kind == "hook on the losses":
            result = network[1:](z).square().mean(1)
            result.register_hook(lambda g: g.sign())
            return result
        return network[1:](z).square().mean(1)

    return losses


@pytest.mark.parametrize(
    "kind",
    [
        "tensor hook",
        "tensor hook that only looks",
        "hook of a weight's transpose",
        "node hook",
        "checkpoint",
        "hook on the losses",
    ],
)
def test_python_code_in_the_graph_is_no_proof(recorder, kind):
    compare(recorder, mlp(), hooked(kind), one_pass=False)


def test_hooks_that_ignore_the_gradient_do_not_matter(recorder):
    calls = []

    def losses(network):
        z = network[0](torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
        z.register_hook(lambda _: calls.append(1))
        return network[1:](z).square().mean(1)

    compare(recorder, mlp(), losses)
    assert calls


def test_hooks_of_parameters_act_once_on_the_final_gradient(recorder):
    def losses(network):
        network[0].weight.register_hook(lambda g: -g)
        return problem((4,), 6)(network)

    compare(recorder, mlp(), losses)


MIXING = {
    "batch norm": lambda network, x: nn.BatchNorm1d(5).double()(network[0](x)),
    "minus the mean": lambda network, x: network[0](x) - network[0](x).mean(0),
    "sort": lambda network, x: network[0](x).sort(0).values,
    "gather": lambda network, x: network[0](x).gather(0, torch.arange(6).flip(0)[:, None].expand(6, 5)),
    "attention over the batch": lambda network, x: functional.scaled_dot_product_attention(*[network[0](x)[None, None]] * 3)[
        0, 0
    ],
    "index": lambda network, x: network[0](x)[torch.arange(6).flip(0)],
    "weights computed from parameters": lambda network, x: x @ network[0].weight.softmax(1).T,
    "weights computed from samples": lambda network, x: network[0](x) @ network[0](x)[:5],
    "penalty of the weights": lambda network, x: network[0](x) + network[0].weight.square().sum(),
    "Function": lambda network, x: Twice.apply(network[0](x)),
    "parameter for each sample": lambda network, x: network[0](x[:5]) + network[2].weight,
}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("name", MIXING)
def test_the_exact_fall_back(recorder, name):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    compare(recorder, mlp(), lambda network: network[1:](MIXING[name](network, x)).square().mean(1), one_pass=False)


def test_stacked_losses_keep_their_own_graphs(recorder):
    losses = problem((4,), 3)
    recorder.allowed = True
    step(mlp(), lambda network: torch.stack(list(losses(network))))
    assert recorder.taken == []


@pytest.mark.parametrize("images", [False, True])
def test_autocast(recorder, images):
    """Weights are cast to half precision, in which the gradients of single samples are rounded."""
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.Flatten()] if images else [nn.Linear(16, 8), nn.LayerNorm(8), nn.ReLU()]
    network = nn.Sequential(*body, nn.Linear(16 if images else 8, CLASSES))
    x, y = torch.randn(5, *((2, 4, 4) if images else (16,))), torch.arange(5) % CLASSES

    def losses(network):
        with torch.autocast("cpu", torch.bfloat16):
            return functional.cross_entropy(network(x), y, reduction="none")

    report, gradients = step(network, losses)
    assert recorder.taken == [True]
    recorder.allowed = False
    expected, expected_gradients = step(network, losses, gradient=lambda _: report.gradient_weights.double())
    lengths = expected.gramian.diagonal().sqrt()
    torch.testing.assert_close(report.gramian / lengths / lengths[:, None], expected.cosines, atol=1e-2, rtol=0)
    torch.testing.assert_close(gradients, expected_gradients, atol=2e-2, rtol=2e-2)


def test_powers_of_two_scale_the_gradients_of_samples_exactly():
    """Products with powers of two are exact, so that any influence of another sample would show."""
    network = mlp().float()
    x, y = torch.randn(32, 4), torch.randint(CLASSES, (32,))
    z = network[:3](x)
    losses = functional.cross_entropy(network[3:](z), y, reduction="none")
    factors = torch.randint(2, (32,)).mul(2).sub(1) * 2.0 ** torch.randint(-6, 7, (32,))
    (plain,) = torch.autograd.grad(losses, z, torch.ones(32), retain_graph=True)
    (scaled,) = torch.autograd.grad(losses, z, factors)
    assert torch.equal(scaled, plain * factors[:, None])
