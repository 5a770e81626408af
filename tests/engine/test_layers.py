"""Weight gradients through a layer's inputs, and the layers that are excluded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from balance import Balancer
from balance.engine.graph import trace
from balance.engine.layers import is_cheaper, layers, measured_tensors
from balance.engine.partition import partition_graph
from tests.engine.definition import in_proportion, many_losses, rows
from tests.networks import Wide, thin_layer

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
    """Check a step on one parameter whose gradients are computed through its layer."""
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
def test_layer_of_a_convolution_yields_its_weight_gradient(name, memory):
    convolution = copy.deepcopy(CONVOLUTIONS[name])
    x = torch.randn(1, convolution.in_channels, 5, 6, requires_grad=True)
    check_layer(convolution.weight, many_losses(convolution(x).tanh(), 20), memory)


def test_rows_of_a_layer_are_exact_near_a_stationary_point():
    """Two gradients that nearly cancel: their sum must not drown in rounding of their inner products."""
    layer, x = thin_layer()
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
def test_layers_excludes_other_uses_of_a_weight(use):
    layer, x = thin_layer()
    losses = many_losses(use(layer, x), 2)
    assert not layers(trace(losses), [layer.weight])
    J = rows(losses, [layer.weight, layer.bias]).double()
    report = Balancer(2, gradient="mgda", memory="gramian").backward(torch.stack(losses), shared=layer.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv3d(8, 8, 1)]
)
def test_layers_excludes_other_convolutions(convolution):
    convolution = copy.deepcopy(convolution)
    shape = {nn.Conv1d: (1, 8, 5), nn.Conv3d: (1, 8, 2, 2, 2)}.get(type(convolution), (1, 8, 5, 5))
    losses = many_losses(convolution(torch.randn(shape)), 2)
    assert not layers(trace(losses), [convolution.weight])
    J = rows(losses, [convolution.weight, convolution.bias]).double()
    report = Balancer(2, gradient="mgda", memory="gramian").backward(torch.stack(losses), shared=convolution.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("without", ["nothing", "bias", "transposition", "two dimensions", "square"])
def test_layers_finds_every_form_of_a_linear_layer(without, memory):
    layer, x = thin_layer()
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


def test_layers_excludes_a_transpose_that_may_have_hooks():
    """If the layer's input needs no gradient, torch does not save the transposed weight, so a hook on it could be hidden."""
    layer, x = thin_layer()
    losses = many_losses(layer(x).tanh(), 8)
    assert not layers(trace(losses), [layer.weight])
    assert layers(trace(many_losses((x @ layer.weight).tanh(), 8)), [layer.weight])


def test_measured_tensors_use_layers_only_where_cheaper():
    found = {}
    for batch in (8, 400):
        model = Wide(batch=batch)
        losses = model.losses()[1]
        parts = partition_graph("parameters", list(losses.values()), model.trunk.parameters(), None, None, [])
        found[batch] = [tensor.layer is not None for tensor in measured_tensors(parts.lower_graph, parts.inputs, 8)]
    assert found == {8: [False, False] + [True, False] * 5, 400: [False] * 12}  # weights and biases
