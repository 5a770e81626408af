"""Gradients of a parameter by sample, from the gradient of the output of an operation that uses the parameter.

The gradient Δ of the output contains the gradients of all losses, each at its own sample. A linear layer with inputs A has the
weight gradient Δᵢᵀ Aᵢ for sample i. Inner products of these matrices are sums of the products (Δ Δᵀ) * (A Aᵀ). The products are
cheaper than the matrices where each sample has few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .nodes import kind
from .sample_axis import by_sample, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ..types import Gramian
    from .sample_axis import Place

# Numbers that are in memory at once, unless one row of a parameter has more
_AT_ONCE = 1 << 23
_AT_ONCE_ON_ACCELERATOR = 1 << 26
_BLOCK = 64  # samples whose inner products are computed at once
_DOUBLE = 4  # cost of a multiplication in double precision relative to one in single precision
_MOVED = 20  # cost of moving a number, relative to a multiplication


class Factors(NamedTuple):
    """The two factors of the gradients of a matrix.

    Attributes:
        outputs: Gradients Δ of the outputs. Shape (B, rows, outputs).
        inputs: Inputs A. Shape (B, rows, inputs).
    """

    outputs: Tensor
    inputs: Tensor


class Use(NamedTuple):
    """One use of a parameter by an operation with a known gradient.

    Attributes:
        node: Node of the operation.
        position: Position of the parameter among the inputs of the operation.
        leaf: The parameter.
        transposed: The operation uses the transpose of the parameter.
        place: Place of the samples in the output of the operation.
        num_samples: Number of samples, B.
    """

    node: Any
    position: int
    leaf: Tensor
    transposed: bool
    place: Place
    num_samples: int

    def gradients(self, delta: Tensor, begin: int, end: int) -> Tensor:
        """Return the gradients of a part of the parameter by sample.

        Args:
            delta: Gradient of the output of the operation.
            begin: First row of the part.
            end: Row after the last row of the part.

        Returns:
            Shape (B, numbers of that part).
        """
        return _FORMULAS[kind(self.node), self.position](self, delta, begin, end).flatten(1)

    def factors(self, delta: Tensor) -> Factors | None:
        """Return the factors of the gradients, if they are products of matrices that are in memory already."""
        name = kind(self.node)
        if (name, self.position) not in _MATRICES:
            return None
        saved = self.node._saved_mat1 if name == "AddmmBackward0" else self.node._saved_self
        inputs = saved.detach() if saved.layout == torch.strided else saved.detach().to_dense()
        return Factors(self._rows(delta), self._rows(inputs))

    def _rows(self, matrix: Tensor) -> Tensor:
        """Return the rows of a matrix by sample. Shape (B, rows, columns)."""
        return by_sample(matrix, self.place, self.num_samples).flatten(1, -2)

    def reduced(self, values: Tensor) -> Tensor:
        """Return the sums of values over everything that the parameter is broadcast over, by sample.

        Args:
            values: The shape of the output of the operation, which the parameter's shape can be expanded to.

        Returns:
            Shape (B, *shape of the parameter), or (B, 1) for a scalar.
        """
        shape, axis = self.leaf.shape, self.place.axis
        split = by_sample(values, self.place, self.num_samples)  # (B, ..., outer, inner, ...)
        missing = values.ndim - len(shape)
        summed = [d for d in range(values.ndim) if d != axis and (d < missing or shape[d - missing] == 1)]
        places = [1 + d + (d > axis) for d in summed]
        return split.sum(dim=(1 + axis, 2 + axis, *places)).reshape(self.num_samples, *(shape or (1,)))


def use_of(node: Any, position: int, leaf: Tensor, *, transposed: bool, inner: int, num_samples: int) -> Use | None:
    """Return the use of a parameter by an operation; None if the gradients by sample are not known.

    Args:
        node: Node of the operation.
        position: Position of the parameter among the inputs of the operation.
        leaf: The parameter.
        transposed: The operation uses the transpose of the parameter.
        inner: Place of the samples in the output of the operation.
        num_samples: Number of samples, B.
    """
    key = (kind(node), position)
    output = tuple(node._input_metadata[0].shape)
    place = locate(output, inner, num_samples)
    if place is None or key not in _FORMULAS or (transposed and key not in _MATRICES):
        return None
    use = Use(node, position, leaf, transposed, place, num_samples)
    return use if _CHECKS.get(key, _is_broadcast)(use, output) else None


def _is_broadcast(use: Use, output: tuple[int, ...]) -> bool:
    """Return whether a parameter is used by all samples: it does not extend along the dimension of the samples."""
    missing = len(output) - use.leaf.ndim
    along = use.place.axis - missing
    return use.leaf.is_floating_point() and (along < 0 or (missing >= 0 and use.leaf.shape[along] == 1))


def _is_plain_product(use: Use, output: tuple[int, ...]) -> bool:
    node = use.node
    plain = kind(node) == "MmBackward0" or (node._saved_alpha == 1 and node._saved_beta == 1)
    return bool(plain) and use.place.axis == 0 and len(output) == 2


def _is_plain_convolution(use: Use, output: tuple[int, ...]) -> bool:
    return use.place.axis == 0 and len(output) > 2 and not use.node._saved_transposed


def _is_batch_first(use: Use, output: tuple[int, ...]) -> bool:
    return use.place.axis == 0 and len(output) >= 2 and getattr(use.node, "_saved_training", False) is False


def _is_before_normalized(use: Use, output: tuple[int, ...]) -> bool:
    return use.place.axis < len(output) - use.leaf.ndim


def _is_plain_embedding(use: Use, output: tuple[int, ...]) -> bool:
    return use.place.axis < len(output) - 1 and use.node._saved_scale_grad_by_freq is False


def _matrix(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    factors = use.factors(delta)
    assert factors is not None
    outputs, inputs = factors
    inputs = inputs.to(outputs.dtype)
    if use.transposed:  # rows of the parameter are outputs
        return outputs[..., begin:end].mT @ inputs
    return inputs[..., begin:end].mT @ outputs


def _same(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    return use.reduced(delta)[:, begin:end]


def _scaled(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    sums = use.reduced(delta)[:, begin:end]
    if use.position == 0:
        return sums
    factor: float = use.node._saved_alpha
    return sums * (-factor if kind(use.node) == "SubBackward0" else factor)


def _product(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    other = use.node._saved_other if use.position == 0 else use.node._saved_self
    return use.reduced(delta * other.detach())[:, begin:end]


def _along_channels(use: Use, values: Tensor) -> Tensor:
    """Return sums over positions, by sample and channel. Shape (B, channels)."""
    first = values.flatten(2).sum(2) if values.ndim > 2 else values
    return by_sample(first, use.place, use.num_samples).flatten(1, -2).sum(1)


def _channel_bias(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    return _along_channels(use, delta)[:, begin:end]


def _group_norm_weight(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    node = use.node
    X = node._saved_input.detach()
    groups = X.reshape(len(X), node._saved_group, -1)
    normalized = (groups - node._saved_result1[..., None]) * node._saved_result2[..., None]
    return _along_channels(use, delta * normalized.detach().view_as(X))[:, begin:end]


def _batch_norm_weight(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    node = use.node
    X = node._saved_input.detach()
    shape = (-1, *[1] * (X.ndim - 2))
    mean, scale = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
    return _along_channels(use, delta * (X - mean.view(shape)) * scale.view(shape))[:, begin:end]


def _layer_norm_weight(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    node = use.node
    normalized = (node._saved_input - node._saved_result1) * node._saved_result2
    return use.reduced(delta * normalized.detach())[:, begin:end]


def _embedding(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    B, node = use.num_samples, use.node
    indices = by_sample(node._saved_indices, use.place, B).reshape(B, -1)
    values = by_sample(delta, use.place, B).reshape(B, indices.shape[1], -1)
    is_inside = (indices >= begin) & (indices < end) & (indices != _padding_index(node))
    targets = (indices - begin).clamp(0, end - begin - 1) + (end - begin) * torch.arange(B, device=delta.device)[:, None]
    gradients = values.new_zeros(B * (end - begin), values.shape[-1])
    gradients.index_add_(0, targets.flatten(), (values * is_inside[..., None]).flatten(0, 1))
    return gradients.view(B, -1)


def _padding_index(node: Any) -> int:
    index: int = node._saved_padding_idx
    return index if index < 1 << 63 else index - (1 << 64)


def _convolution(use: Use, delta: Tensor, begin: int, end: int) -> Tensor:
    """Return the gradients of the filters of a convolution, by one convolution that has a group for each image."""
    node, weight, X = use.node, use.leaf, use.node._saved_input.detach()
    groups, images = node._saved_groups, len(delta)
    if groups == 1:
        delta = delta[:, begin:end]
    filters = delta.new_empty(images * delta.shape[1], *weight.shape[1:])  # only its shape matters
    _, gradient, _ = torch.ops.aten.convolution_backward(
        delta.reshape(1, -1, *delta.shape[2:]),
        X.to(delta.dtype).reshape(1, -1, *X.shape[2:]),
        filters,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        False,  # not transposed  # noqa: FBT003
        [0] * (X.ndim - 2),
        groups * images,
        [False, True, False],
    )
    by_image = gradient.reshape(images, delta.shape[1], -1)
    by_image = (by_image if groups == 1 else by_image[:, begin:end]).flatten(1)
    return by_image if images == use.num_samples else by_sample(by_image, use.place, use.num_samples).sum(dim=(1, 2))


def _limit(tensor: Tensor) -> int:
    return _AT_ONCE if tensor.device.type == "cpu" else _AT_ONCE_ON_ACCELERATOR


_MATRICES = {("AddmmBackward0", 2), ("MmBackward0", 1)}
_CHECKS: dict[tuple[str, int], Callable[[Use, tuple[int, ...]], bool]] = {
    **dict.fromkeys(_MATRICES, _is_plain_product),
    ("AddmmBackward0", 0): lambda use, output: _is_plain_product(use, output) and _is_broadcast(use, output),
    ("ConvolutionBackward0", 1): _is_plain_convolution,
    ("ConvolutionBackward0", 2): _is_batch_first,
    ("NativeGroupNormBackward0", 1): _is_batch_first,
    ("NativeGroupNormBackward0", 2): _is_batch_first,
    ("NativeBatchNormBackward0", 1): _is_batch_first,
    ("NativeBatchNormBackward0", 2): _is_batch_first,
    ("NativeLayerNormBackward0", 1): _is_before_normalized,
    ("NativeLayerNormBackward0", 2): _is_before_normalized,
    ("EmbeddingBackward0", 0): _is_plain_embedding,
}
_FORMULAS: dict[tuple[str, int], Callable[[Use, Tensor, int, int], Tensor]] = {
    **dict.fromkeys(_MATRICES, _matrix),
    ("AddmmBackward0", 0): _same,
    ("ConvolutionBackward0", 1): _convolution,
    ("ConvolutionBackward0", 2): _channel_bias,
    ("NativeGroupNormBackward0", 1): _group_norm_weight,
    ("NativeGroupNormBackward0", 2): _channel_bias,
    ("NativeBatchNormBackward0", 1): _batch_norm_weight,
    ("NativeBatchNormBackward0", 2): _channel_bias,
    ("NativeLayerNormBackward0", 1): _layer_norm_weight,
    ("NativeLayerNormBackward0", 2): _same,
    ("EmbeddingBackward0", 0): _embedding,
    ("AddBackward0", 0): _scaled,
    ("AddBackward0", 1): _scaled,
    ("SubBackward0", 0): _scaled,
    ("SubBackward0", 1): _scaled,
    ("MulBackward0", 0): _product,
    ("MulBackward0", 1): _product,
    ("ExpandBackward0", 0): _same,
}


class SampleGramian:
    """Inner products of the gradients of B samples, added parameter by parameter, in float64.

    Args:
        num_samples: Number of samples, B.
        device: Device of the result.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._upper = torch.zeros(num_samples, num_samples, dtype=torch.float64, device=device)
        # A product of a matrix and its transpose is symmetric, which saves up to half of the multiplications
        self._block = _BLOCK if device.type == "cpu" else num_samples

    def total(self) -> Gramian:
        """Return the inner products over all parameters so far. Shape (B, B)."""
        return self._upper.triu() + self._upper.triu(1).T

    def add(self, uses: Sequence[tuple[Use, Tensor]], *, with_bias: bool = False) -> None:
        """Add the inner products of the gradients of one parameter.

        Args:
            uses: All uses of the parameter, each with the gradient of the output of its operation.
            with_bias: Add the bias of the layer as well, if the parameter is the weight of a linear layer.
        """
        first, delta = uses[0]
        factors = first.factors(delta) if len(uses) == 1 else None
        if factors is not None and _is_cheaper(factors):
            self._add_products(factors, with_bias=with_bias)
            return
        if factors is not None and with_bias:
            self._add_rows(factors.outputs.sum(1))
        leaf = first.leaf
        length, row = (len(leaf), leaf[0].numel()) if leaf.ndim else (1, 1)
        step = max(_limit(delta) // max(row * first.num_samples, 1), 1)
        for begin in range(0, length, step):
            end = min(begin + step, length)
            parts = [use.gradients(gradient, begin, end) for use, gradient in uses]
            self._add_rows(parts[0] if len(parts) == 1 else torch.stack(parts).sum(0))

    def _add_rows(self, J: Tensor) -> None:
        J = J.double().to(self._upper.device)
        for begin in range(0, len(J), self._block):
            self._upper[begin : begin + self._block, begin:].addmm_(J[begin : begin + self._block], J[begin:].T)

    def _add_products(self, factors: Factors, *, with_bias: bool) -> None:
        """Add the inner products of matrices, given by their factors, for a few samples at a time."""
        B, rows = factors.outputs.shape[:2]
        outputs, inputs = (part.double().flatten(0, 1) for part in factors)
        step = min(max(_limit(outputs) // (B * rows * rows), 1), self._block)
        for begin in range(0, B, step):
            end, rest = min(begin + step, B), slice(begin * rows, None)
            part = slice(begin * rows, end * rows)
            products = inputs[part] @ inputs[rest].T
            products = (products.add_(1) if with_bias else products).mul_(outputs[part] @ outputs[rest].T)
            if rows > 1:
                products = products.view(end - begin, rows, B - begin, rows).sum(dim=(1, 3))
            self._upper[begin:end, begin:] += products.to(self._upper.device)


def _is_cheaper(factors: Factors) -> bool:
    """Return whether products of the factors cost less than the matrices and their products."""
    B, rows, outputs = factors.outputs.shape
    inputs = factors.inputs.shape[2]
    by_factors = (B * rows) ** 2 * (_DOUBLE * (outputs + inputs) + _MOVED) + _MOVED * B * rows * (outputs + inputs)
    by_matrices = B * outputs * inputs * (rows + _MOVED + _DOUBLE * B)
    return by_factors <= by_matrices
