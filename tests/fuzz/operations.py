"""Operations of the random networks: each maps (batch, width) to (batch, width), in up to eight variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.utils.checkpoint import checkpoint

from tests.fuzz.functions import FusedLinear, KeepsVariable, Opaque, Reverse, Round

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.networks import Maker

    Forward = Callable[[Tensor], Tensor]

OPERATIONS: dict[str, Callable[[Maker, int], Forward]] = {}
VARIANTS = 8
# Operations whose gradient can be differentiated once more
TWICE = ("linear", "mlp", "affine", "activation", "views", "gain", "tied", "sliced", "parametrized", "einsum", "dropout")


def operation(build: Callable[[Maker, int], Forward]) -> Callable[[Maker, int], Forward]:
    OPERATIONS[build.__name__] = build
    return build


def fit(x: Tensor, width: int) -> Tensor:
    """Bring any output to shape (batch, width)."""
    x = x.flatten(1)
    if x.shape[1] < width:
        x = torch.cat([x] * -(-width // x.shape[1]), dim=1)
    return x[:, :width]


@operation
def linear(make: Maker, v: int) -> Forward:
    n = make.width // 2 if v >= 6 else make.width
    W = make.weight(n, n)
    b = make.leaf(n) if v % 2 else None

    def forward(h: Tensor) -> Tensor:
        if v < 2:
            return F.linear(h, W, b)
        if v >= 6:
            return F.linear(h.reshape(-1, 2, n), W, b).flatten(1)
        out = h @ make.touch(W.t()) if v < 4 else h @ W
        return out if b is None else out + b

    return forward


@operation
def mlp(make: Maker, v: int) -> Forward:
    n = 2 * make.width
    W, U = make.weight(n, make.width), make.weight(make.width, n)
    b = make.leaf(n) if v % 2 else None
    return lambda h: F.linear((torch.tanh, torch.relu, torch.sigmoid, F.gelu)[v // 2](F.linear(h, W, b)), U)


@operation
def affine(make: Maker, v: int) -> Forward:
    """Products of matrices with factors, or in batches."""
    W, b = make.weight(make.width, make.width), make.leaf(make.width)

    def forward(h: Tensor) -> Tensor:
        if v < 3:
            return torch.addmm(b, h, make.touch(W.t()), beta=(1, 2, 0.5)[v], alpha=(1, 0.7, -1)[v])
        if v < 5:
            return torch.baddbmm(b.view(1, 1, -1), h[:, None], W.expand(len(h), -1, -1), alpha=v - 2.5)[:, 0]
        if v < 7:
            return torch.bmm(h[None], W[None])[0] + torch.mv(W, b)
        return torch.stack([torch.addmv(b, W, row) for row in h])

    return forward


@operation
def conv(make: Maker, v: int) -> Forward:
    C = make.width // 4
    shape = {1: (C, 1, 3, 3), 4: (2, C, 3), 7: (C, C, 1, 1)}.get(v, (C, C, 3, 3))
    W = make.leaf(*shape, scale=0.5, channels_last=v == 3)
    b = None if v == 7 else make.leaf(shape[0])

    def forward(h: Tensor) -> Tensor:
        x = h.reshape(-1, C, 2, 2)
        if v == 4:
            out = F.conv1d(x.flatten(2), W, b, padding=1)
        elif v == 5:
            out = F.conv_transpose2d(x, W, b, padding=1)
        elif v == 3:
            out = F.conv2d(x.contiguous(memory_format=torch.channels_last), W, b, padding=1)
        else:
            stride, dilation = (2 if v == 2 else 1), (2 if v == 6 else 1)
            groups, padding = (C if v == 1 else 1), (0 if v == 7 else dilation)
            out = F.conv2d(x, make.touch(W.view_as(W)) if v == 7 else W, b, stride, padding, dilation, groups)
        return fit(out, make.width)

    return forward


@operation
def norm(make: Maker, v: int) -> Forward:
    D = make.width
    layer = (
        lambda: nn.LayerNorm(D, eps=0.1),
        lambda: nn.BatchNorm1d(D, eps=0.1),
        lambda: nn.GroupNorm(2, D, eps=0.1),
        lambda: nn.BatchNorm2d(D // 4, eps=0.1),
        lambda: nn.InstanceNorm2d(D // 4, eps=0.1, affine=True),
        lambda: nn.BatchNorm1d(D, eps=0.1).eval(),
        lambda: nn.RMSNorm(D, eps=0.1),
        lambda: nn.LayerNorm((D // 4, 4), eps=0.1),
    )[v]()
    make.module(layer)
    shape = {3: (-1, D // 4, 2, 2), 4: (-1, D // 4, 2, 2), 7: (-1, D // 4, 4)}.get(v, (-1, D))
    return lambda h: layer(h.reshape(shape)).flatten(1)


@operation
def attention(make: Maker, v: int) -> Forward:
    n = make.width // 2
    if v < 4:
        layer = make.module(nn.MultiheadAttention(n, 1 + v % 2, bias=v >= 2, batch_first=True))

        def forward(h: Tensor) -> Tensor:
            x = h.reshape(-1, 2, n)
            return layer(x, x, x, need_weights=v == 3)[0].flatten(1) + h

        return forward
    W = make.weight(3 * n, n)

    def forward(h: Tensor) -> Tensor:
        x = h.reshape(-1, 2, n)
        q, k, u = F.linear(x, W).chunk(3, dim=-1)
        if v < 6:
            return F.scaled_dot_product_attention(q, k, u, is_causal=v == 5).flatten(1) + h
        return ((q @ k.mT if v == 6 else torch.einsum("bqd,bkd->bqk", q, k)).softmax(-1) @ u).flatten(1) + h

    return forward


@operation
def recurrent(make: Maker, v: int) -> Forward:
    n = make.width // 2
    kinds = (nn.GRU, nn.LSTM, nn.RNN, nn.GRUCell, nn.LSTMCell)
    if v < 3:
        layer = make.module(kinds[v](n, n, batch_first=True))
        return lambda h: layer(h.reshape(-1, 2, n))[0].flatten(1)
    if v < 5:
        cell = make.module(kinds[v](n, n))

        def forward(h: Tensor) -> Tensor:
            state = cell(h[:, :n])
            after = cell(h[:, n:], state)
            return torch.cat([state, after] if v == 3 else [after[0], after[1]], dim=1)

        return forward
    W, U = make.weight(n, n), make.weight(n, n)

    def loop(h: Tensor) -> Tensor:
        state, out = torch.zeros_like(h[:, :n]), []
        for part in (h[:, :n], h[:, n:], h[:, :n]):
            state = (F.linear(part, W) + (state @ make.touch(U.t()) if v == 6 else F.linear(state, U))).tanh()
            out.append(state)
        return torch.cat(out[-2:], dim=1)

    return loop


@operation
def embedding(make: Maker, v: int) -> Forward:
    table = make.weight(5, make.width)
    index, other = make.integers(5, make.batch), make.integers(5, make.batch)
    sparse = v in (1, 2, 3, 5)

    def forward(h: Tensor) -> Tensor:
        if v == 3:
            return h + F.embedding_bag(torch.stack([index, other], 1), table, mode="sum", sparse=True)
        if v == 6:
            return h * table[index]
        if v == 7:
            return h + F.one_hot(index, 5).to(h) @ table
        out = h + F.embedding(index, table, sparse=sparse, padding_idx=2 if v == 4 else None)
        if v == 2:  # tied with a projection, whose gradient is dense
            return out + (h @ table.t()) @ table
        return out * F.embedding(other, table, sparse=sparse) if v == 5 else out

    return forward


@operation
def views(make: Maker, v: int) -> Forward:
    D = make.width
    order = make.integers(D, D)
    return (
        lambda h: h.t().contiguous().t() * 1.1,
        lambda h: h.flip(1) + h.roll(1, 0),
        lambda h: torch.cat([h[:, D // 2 :], h[:, : D // 2]], 1),
        lambda h: h.index_select(1, order),
        lambda h: torch.stack(h.unbind(1)[::-1], 1),
        lambda h: h.expand(2, -1, -1).mean(0) + h[:1],
        lambda h: h.unfold(1, 2, 1).sum(-1).repeat(1, 2)[:, :D],
        lambda h: h.reshape(-1, 2, D // 2).transpose(1, 2).reshape(-1, D),
    )[v]


@operation
def gain(make: Maker, v: int) -> Forward:
    """Broadcast parameters."""
    D = make.width
    w = make.leaf(*((D,), (1, D), (), (1,), (make.batch, 1), (D,), (2, D), (1, D))[v])
    return (
        lambda h: h * w,
        lambda h: h + w,
        lambda h: h * w + w,
        lambda h: h * w.exp(),
        lambda h: h + w,
        lambda h: h * make.touch(w.expand(len(h), -1)),
        lambda h: h * w.prod(0),
        lambda h: F.linear(h, w.expand(D, -1)) + h,
    )[v]


@operation
def inplace(make: Maker, v: int) -> Forward:
    w = make.leaf(make.width)
    order = make.integers(make.width, 2)

    def forward(h: Tensor) -> Tensor:
        y = h * w if v == 2 else h.clone(memory_format=torch.contiguous_format)
        if v == 0:
            y.mul_(1.3).add_(w)
        elif v == 1:
            y[:, 0] = h[:, 1] * w[0]
        elif v == 2:
            y.relu_()
        elif v == 3:
            y.view(-1)[::2].mul_(0.5)
        elif v == 4:
            y = torch.zeros_like(h)
            y[:, 1:] = h[:, 1:] * w[1:]
            y += h
        elif v == 5:
            y.clamp_(-1.0, 1.0)
        elif v == 6:
            y.index_add_(1, order, h[:, :2] * w[:2])
        else:
            first, second = y.chunk(2, dim=1)
            y = torch.cat([first, second * w[0]], 1).t_().mul_(0.9).t_()
        return y

    return forward


@operation
def tied(make: Maker, v: int) -> Forward:
    W = make.known_square(v)
    return (lambda h: F.linear(h, W)) if v % 2 else (lambda h: h @ make.touch(W.view_as(W)))


@operation
def sliced(make: Maker, v: int) -> Forward:
    D = make.width
    W = make.weight(2 * D, D)
    order = make.integers(2 * D, D)

    def forward(h: Tensor) -> Tensor:
        if v < 4:
            part = (W[:D], W[::2], W[order], W.narrow(0, 1, D))[v]
            return F.linear(h, make.touch(part))
        if v == 4:
            return F.linear(h, W)[:, :D]
        if v == 5:
            first, second = W.chunk(2)
            return F.linear(F.linear(h, first).tanh(), second)
        return h @ (W[:D] + W[D:].t()) if v == 6 else h @ W.view(D, 2, D).mean(1)

    return forward


@operation
def custom(make: Maker, v: int) -> Forward:
    W = make.weight(make.width, make.width)
    return (
        lambda h: h @ Reverse.apply(W),
        lambda h: h @ KeepsVariable.apply(W),
        lambda h: Opaque.apply(h @ W),
        lambda h: FusedLinear.apply(h, W)[0] + FusedLinear.apply(h, W)[1],
        lambda h: Round.apply(F.linear(h, W)),
        lambda h: Reverse.apply(h) @ W,
        lambda h: KeepsVariable.apply(F.linear(h, W)),
        lambda h: h @ Opaque.apply(W),
    )[v]


@operation
def parametrized(make: Maker, v: int) -> Forward:
    D = make.width
    W, A, B, g = make.weight(D, D), make.leaf(D, 2), make.leaf(2, D), make.leaf(D, 1)
    mask = make.mask(D, D)
    return (
        lambda h: F.linear(h, g * W / W.norm(dim=1, keepdim=True)),
        lambda h: F.linear(h, W + A @ B),
        lambda h: F.linear(h, W) + F.linear(F.linear(h, B), A),
        lambda h: F.linear(h, make.touch(W * mask)),
        lambda h: F.linear(h, W.tril()),
        lambda h: F.linear(h, (W - W.t()).matrix_exp()),
        lambda h: F.linear(h, W.softmax(1)),
        lambda h: F.linear(h, W.detach() * g),
    )[v]


@operation
def cast(make: Maker, v: int) -> Forward:
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float32)[v % 4]
    make.lower(dtype)
    W = make.weight(make.width, make.width, dtype=dtype if v < 4 else torch.float64)
    return lambda h: F.linear(h.to(dtype), W.to(dtype)).to(torch.float64)


@operation
def complexes(make: Maker, v: int) -> Forward:
    w = make.leaf(make.width // 2, 2)

    def forward(h: Tensor) -> Tensor:
        z = torch.view_as_complex(h.reshape(len(h), -1, 2).contiguous())
        c = torch.view_as_complex(w.contiguous())
        z = z * c if v % 2 else z * c.conj() + c
        z = torch.fft.fft(z, dim=1) if v >= 4 else z
        return torch.view_as_real(z).flatten(1) if v % 4 < 2 else torch.cat([z.real, z.imag], 1)

    return forward


@operation
def vmapped(make: Maker, v: int) -> Forward:
    W = make.leaf(2, make.width, make.width)
    vmap, grad = torch.func.vmap, torch.func.grad
    if v < 3:
        return vmap(lambda row: (W[0] @ row).tanh())
    if v < 6:
        return lambda h: vmap(lambda U: F.linear(h, U).tanh())(W).mean(0)
    return lambda h: h + 0.3 * vmap(grad(lambda row: (W[0] @ row).tanh().sum()))(h)


@operation
def dropout(make: Maker, v: int) -> Forward:
    return make.mask(make.batch, make.width).mul


@operation
def activation(make: Maker, v: int) -> Forward:
    return (
        torch.tanh,
        torch.relu,
        F.gelu,
        torch.sin,
        lambda h: h.softmax(1) * 2,
        F.softplus,
        lambda h: h * h.sigmoid(),
        lambda h: h.cumsum(1) * 0.3,
    )[v]


@operation
def einsum(make: Maker, v: int) -> Forward:
    W = make.weight(make.width, make.width)
    if v < 6:
        return lambda h: torch.einsum("bi,oi->bo" if v < 3 else "bi,io->bo", h, W)
    return lambda h: torch.tensordot(h, W, dims=([1], [1]))


@operation
def energy(make: Maker, v: int) -> Forward:
    """Add the gradient of an energy, so a double backward pass follows."""
    W = make.weight(make.width, make.width)

    def forward(h: Tensor) -> Tensor:
        x = h if h.requires_grad else h.detach().requires_grad_()
        (force,) = torch.autograd.grad(F.linear(x, W).tanh().sum(), x, create_graph=True)
        return x + (0.2 if v % 2 else -0.5) * force

    return forward


def segment(forward: Forward, kind: str) -> Forward:
    """Run a part of a network under a checkpoint, or with hooks on the saved tensors."""
    if kind == "checkpoint":
        return lambda h: checkpoint(forward, h, use_reentrant=False, preserve_rng_state=False)

    def saved(h: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone(),), lambda box: box[0].clone()):
            return forward(h)

    return saved
