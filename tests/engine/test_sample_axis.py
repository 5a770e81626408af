"""Rules for operations that keep samples apart, against derivatives by brute force."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from balance.engine.graph import trace
from balance.engine.independence import independent_samples
from balance.engine.sample_axis import Place, by_sample, locate

B = 4


def constant(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(module):
    return module.double()


INDEX = torch.arange(B)
ELEMENTWISE = {
    "add": lambda x: x + constant(*x.shape),
    "subtract from a number": lambda x: 2 - x,
    "times itself": lambda x: x * x,
    "divide": lambda x: 1 / (x.square() + 1) + x / 3,
    "broadcast": lambda x: x[..., :1] * x,
    "broadcast along the first": lambda x: x[:1] * x,
    "expand": lambda x: x[:, :1].expand(x.shape),
    "functions": lambda x: x.tanh().exp().sin().sigmoid().abs().add(1).log().sqrt().pow(2).rsqrt().neg().reciprocal(),
    "activations": lambda x: functional.gelu(functional.silu(functional.elu(functional.leaky_relu(x)))),
    "more activations": lambda x: functional.softplus(functional.hardswish(functional.mish(x))).clamp(0.1, 3),
    "where": lambda x: torch.where(x > 0, x, 3 * x).masked_fill(x > 1, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)).minimum(x.square()),
    "cast": lambda x: x.float().double() + x.clone().contiguous(),
    "dropout": lambda x: functional.dropout(x, 0.3),
    "minus the detached mean": lambda x: x - x.mean(0).detach(),
    "triangle": lambda x: x.tril() + x.triu(1),
    "losses": lambda x: (
        functional.mse_loss(x, x.square(), reduction="none") + functional.smooth_l1_loss(x, x.cos(), reduction="none")
    ),
    "binary losses": lambda x: functional.binary_cross_entropy_with_logits(x, constant(*x.shape).sigmoid(), reduction="none"),
}
ALONG_THE_LAST = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean without the dimension": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(-1).values,
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "variance": lambda x: x.var(-1, correction=int(x.shape[-1] > 1)) + x.std(-1, correction=int(x.shape[-1] > 1)),
    "cumsum": lambda x: x.cumsum(-1),
    "glu": lambda x: functional.glu(x, -1),
    "sort": lambda x: x.sort(-1).values + x.topk(B, -1).values,
    "gather": lambda x: x.gather(-1, INDEX.expand(x.shape).flip(-1)),
    "index_select": lambda x: x.index_select(-1, INDEX),
    "flip": lambda x: x.flip(-1),
    "slice": lambda x: x[..., 1:],
    "select": lambda x: x.select(-1, 1),
    "unbind": lambda x: x.unbind(-1)[0] * x.unbind(-1)[2],
    "chunk": lambda x: x.chunk(2, -1)[1],
    "cat": lambda x: torch.cat([x, x.square()], -1),
    "pad": lambda x: functional.pad(x, (1, 2)),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[-1:], constant(x.shape[-1]), constant(x.shape[-1])),
    "linear": lambda x: functional.linear(x, constant(3, B), constant(3)),
    "product with a matrix": lambda x: x @ constant(B, B),
}
OF_IMAGES = {  # of shape (B, B, B, B)
    "convolution": lambda x: functional.conv2d(x, constant(B, B, 3, 3), constant(B), padding=1),
    "groups": lambda x: functional.conv2d(x, constant(B, 2, 1, 1), groups=2),
    "transposed convolution": lambda x: functional.conv_transpose2d(x, constant(B, B, 2, 2)),
    "max_pool2d": lambda x: functional.max_pool2d(x, 2),
    "avg_pool2d": lambda x: functional.avg_pool2d(x, 2),
    "adaptive pooling": lambda x: functional.adaptive_avg_pool2d(x, 2),
    "upsample": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "bilinear": lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "group_norm": lambda x: functional.group_norm(x, 2, constant(B), constant(B)),
    "batch_norm in evaluation": lambda x: functional.batch_norm(x, constant(B), constant(B).exp(), constant(B), constant(B)),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x.square(), x.cos()),
    "bmm": lambda x: (x.flatten(0, 1) @ x.flatten(0, 1).mT).view(B, B, B, B),
}
MOVES = {
    "flatten": lambda x: x.flatten(0, 1),
    "view": lambda x: x.reshape(B, -1),
    "unflatten": lambda x: x.unflatten(0, (2, 2)),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "stack": lambda x: torch.stack([x, x.square()], 1),
    "stack first": lambda x: torch.stack([x, x.square()]),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1)[None],
    "transposed matrices": lambda x: x.mT.contiguous(),
}
MIXING = {
    "mean of all samples": lambda x: x - x.mean(0),
    "sort over samples": lambda x: x.sort(0).values,
    "gather over samples": lambda x: x.gather(0, INDEX.flip(0)[:, None, None].expand(x.shape)),
    "softmax over samples": lambda x: x.softmax(0),
    "flip samples": lambda x: x.flip(0),
    "roll samples": lambda x: x.roll(1, 0),
    "index samples": lambda x: x[INDEX.flip(0)],
    "attention over samples": lambda x: functional.scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3)[0].transpose(
        0, 1
    ),
    "batch_norm in training": lambda x: functional.batch_norm(x, None, None, training=True),
    "norm of everything": lambda x: x / x.norm(),
    "cumulative sum over samples": lambda x: x.cumsum(0),
    "one sample for all": lambda x: x[:1] + x,
    "inner products of samples": lambda x: (x.flatten(1) @ x.flatten(1).T)[..., None] + x,
    "product with a matrix of samples": lambda x: (constant(B, B) @ x.flatten(1)).view_as(x),
}


def place_of(function, shape, axis):
    """Return the proved place of the samples in the input, checked by brute force; the losses lie along an axis."""
    x = constant(*shape).requires_grad_()
    z = x * 1
    torch.manual_seed(0)
    output = function(z)
    others = [d for d in range(output.ndim) if d != axis]
    losses = (output * constant(*output.shape)).sum(others) if others else output * 1
    samples = independent_samples(losses, trace([losses], stop=[z]), [z], at_features=True)
    if samples is None:
        return None
    inner = samples.places[0]
    numbers = torch.arange(z.numel()).view(z.shape)
    for i in range(B):
        (gradient,) = torch.autograd.grad(losses[i], z, retain_graph=True)
        outside = gradient[(numbers // inner) % B != i]
        assert (outside.nan_to_num() == 0).all(), f"sample {i} has a gradient outside of its place"  # NaN: 0 times infinity
    return locate(z.shape, inner, B)


def axes(function, shape):
    output = function(constant(*shape))
    return [axis for axis, size in enumerate(output.shape) if size == B]


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ALONG_THE_LAST, *OF_IMAGES, *MOVES, *MIXING])
def test_a_proof_is_right_for_every_axis_that_may_contain_the_samples(name):
    """All dimensions have B entries, so that a wrong dimension would fit too."""
    function = (ELEMENTWISE | ALONG_THE_LAST | OF_IMAGES | MOVES | MIXING)[name]
    shape = (B,) * (4 if name in OF_IMAGES else 3)
    for axis in axes(function, shape):
        place_of(function, shape, axis)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ALONG_THE_LAST, *OF_IMAGES])
def test_samples_in_the_first_dimension_are_recognised(name):
    function = (ELEMENTWISE | ALONG_THE_LAST | OF_IMAGES)[name]
    if name == "broadcast along the first":
        assert place_of(function, (B, B, B), 0) is None
    else:
        assert place_of(function, (B,) * (4 if name in OF_IMAGES else 3), 0) == Place(0, 1)


@pytest.mark.parametrize(
    ("name", "axis", "place"),
    [
        ("view", 0, Place(0, 1)),
        ("transpose", 0, Place(1, 1)),
        ("permute", 0, Place(2, 1)),
        ("permute", 1, Place(0, 1)),
        ("stack", 0, Place(0, 1)),
        ("stack first", 1, Place(0, 1)),
        ("unsqueeze", 1, Place(0, 1)),
        ("transposed matrices", 1, Place(2, 1)),
    ],
)
def test_samples_are_followed_through_moves_of_dimensions(name, axis, place):
    assert place_of(MOVES[name], (B, B, B), axis) == place


@pytest.mark.parametrize("name", MIXING)
def test_operations_that_mix_samples_are_no_proof(name):
    assert place_of(MIXING[name], (B, B, B), 0) is None


CHAINED = ELEMENTWISE | ALONG_THE_LAST | MOVES | MIXING


@given(st.lists(st.sampled_from(list(CHAINED)), min_size=1, max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_a_proof_is_right_for_chains_of_operations(names, data):
    def chain(x):
        for name in names:
            x = CHAINED[name](x)
        return x

    try:
        possible = axes(chain, (B, B, B))
    except (RuntimeError, IndexError, TypeError, ValueError):  # shapes that do not fit
        assume(False)
    assume(possible)
    place_of(chain, (B, B, B), data.draw(st.sampled_from(possible)))


def test_weights_that_look_like_samples_are_no_samples():
    """The weight of a convolution with B filters, computed from features, has B rows that all samples use."""
    images = constant(B, B, B, B)
    assert place_of(lambda x: functional.conv2d(images, x, padding=1), (B, B, 3, 3), 0) is None
    assert place_of(lambda x: functional.linear(images.flatten(1), x.flatten(1)), (B, B, B * B), 0) is None
    assert place_of(lambda x: functional.group_norm(images, 2, x[:, 0, 0]), (B, B, B), 0) is None
    assert place_of(lambda x: functional.layer_norm(images, (B,), x[:, 0, 0]), (B, B, B), 0) is None
    assert place_of(lambda x: constant(B, B) @ x.flatten(1), (B, B, B), 0) is None


def test_samples_can_be_spread_over_blocks_of_a_dimension():
    tensor = torch.arange(2 * B * 3 * 5).view(2 * B * 3, 5)
    place = locate(tensor.shape, 15, B)
    assert place == Place(0, 3)
    samples = by_sample(tensor, place, B)
    for i in range(B):
        assert ((samples[i] // 15) % B == i).all()
    assert locate((2, B // 2, 5), 5, B) is None
    assert locate((0, B), 1, B) is None


def test_layers_of_a_transformer():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(B, 2, 8, batch_first=True, dropout=0.1)
    assert place_of(layer(encoder), (B, 3, B), 0) == Place(0, 1)
    encoder.self_attn.batch_first = False
    assert place_of(layer(encoder), (B, 3, B), 0) is None
    assert place_of(layer(encoder), (3, B, B), 1) == Place(1, 1)
