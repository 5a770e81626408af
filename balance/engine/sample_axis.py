"""Operations of autograd whose gradients keep samples apart, and the place of the samples among the numbers of a tensor.

In row-major order, a tensor of a batch of B samples has the shape (outer, B, inner). The number at index n belongs to sample
``(n // inner) % B``. Reshaping does not change this, so one integer, ``inner``, is the place of the samples.

Each rule below takes the place of the samples in the output of an operation, and returns their place in an input. It does so
only where the gradient of sample i in the output yields a gradient of only sample i in the input. Operations without a rule
are unknown.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .nodes import kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Shape = tuple[int, ...]

_WRAPPED = 1 << 63  # torch shows negative dimensions as unsigned numbers


class Place(NamedTuple):
    """The place of B samples in a tensor.

    Attributes:
        axis: The dimension that contains them, of size outer * B * inner.
        inner: Size of the part of that dimension inside of one sample.
    """

    axis: int
    inner: int


def locate(shape: Shape, inner: int, num_samples: int) -> Place | None:
    """Return the dimension that contains the samples; None if they are spread over several dimensions.

    Args:
        shape: Shape of the tensor.
        inner: Distance of two samples in row-major order.
        num_samples: Number of samples, B.
    """
    below = 1
    if 0 in shape:
        return None
    for axis in range(len(shape) - 1, -1, -1):
        if inner % below == 0 and shape[axis] % (inner // below * num_samples) == 0:
            return Place(axis, inner // below)
        below *= shape[axis]
    return None


def by_sample(tensor: Tensor, place: Place, num_samples: int) -> Tensor:
    """Return a tensor with the samples first. Shape (B, ..., outer, inner, ...), with the other dimensions in order."""
    if place == (0, 1) and len(tensor) == num_samples:
        return tensor[:, None, None]
    shape = tensor.shape
    split = tensor.reshape(*shape[: place.axis], -1, num_samples, place.inner, *shape[place.axis + 1 :])
    return torch.movedim(split, place.axis + 1, 0)


def input_place(node: Any, position: int, output: Shape, given: Shape, inner: int, num_samples: int) -> int | None:
    """Return the place of the samples in an input of an operation, as their distance.

    Args:
        node: The node of the operation.
        position: Number of the input.
        output: Shape of its output.
        given: Shape of the input.
        inner: Place of the samples in the output.
        num_samples: Number of samples, B.

    Returns:
        None if the operation is unknown or may mix samples.
    """
    name = kind(node)
    if position not in _DATA.get(name, (position,)):
        return None
    if name in _RESHAPES:
        return inner if math.prod(output) == math.prod(given) else None
    if name in _ELEMENTWISE and output == given:
        return inner
    rule = _broadcast if name in _ELEMENTWISE else _RULES.get(name)
    place = None if rule is None else locate(output, inner, num_samples)
    axis = None if rule is None or place is None else rule(node, output, given, place.axis)
    if axis is None or place is None or not 0 <= axis < len(given) or given[axis] != output[place.axis]:
        return None
    return place.inner * math.prod(given[axis + 1 :])


def is_elementwise(node: Any, shape: Shape) -> bool:
    """Return whether a node's operation treats every number separately, given the shape of its inputs."""
    return kind(node) in _ELEMENTWISE and all(tuple(output.shape) == shape for output in node._input_metadata)


def _broadcast(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis - (len(output) - len(given))


def _dimensions(node: Any, size: int) -> set[int] | None:
    """Return the dimensions on which an operation works; None if they are not known."""
    value = getattr(node, "_saved_dim", None)
    if value is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    return {_signed(dimension) % size for dimension in values} or None


def _signed(dimension: int) -> int:
    return dimension - 2 * _WRAPPED if dimension >= _WRAPPED else dimension


def _along(node: Any, output: Shape, given: Shape, axis: int) -> int | None:
    """Follow an operation along other dimensions, which the output keeps or leaves out."""
    dimensions = _dimensions(node, len(given))
    if dimensions is None:
        return None
    if len(output) == len(given):
        return axis if axis not in dimensions else None
    rest = [dimension for dimension in range(len(given)) if dimension not in dimensions]
    return rest[axis] if len(rest) == len(output) else None


def _slice(node: Any, output: Shape, given: Shape, axis: int) -> int | None:
    return axis if output == given and node._saved_step == 1 else _along(node, output, given, axis)


def _stack(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    new = _signed(node._saved_dim) % len(output)
    return None if axis == new else axis - (axis > new)


def _flip(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis if axis not in {_signed(dimension) % len(given) for dimension in node._saved_dims} else None


def _transpose(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    first, second = (_signed(dimension) % len(given) for dimension in (node._saved_dim0, node._saved_dim1))
    return {first: second, second: first}.get(axis, axis)


def _matrix_transpose(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return len(output) - 1 - axis


def _permute(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return _signed(node._saved_dims[axis]) % len(given)


def _layer_norm(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis if axis < len(given) - len(node._saved_normalized_shape) else None


def _pad(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis if axis < len(given) - len(node._saved_pad) // 2 else None


def _pool(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis if axis < len(given) - 2 else None


def _first(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    """Follow an operation that treats every index of the first dimension separately."""
    return 0 if axis == 0 else None


def _attention(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return axis if len(given) == 4 and axis < 2 else None


def _batch_norm(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return 0 if axis == 0 and node._saved_training is False else None


def _unreduced(node: Any, output: Shape, given: Shape, axis: int) -> int | None:
    return _broadcast(node, output, given, axis) if node._saved_reduction == 0 else None


def _unreduced_first(node: Any, output: Shape, given: Shape, axis: int) -> int | None:  # noqa: ARG001
    return 0 if axis == 0 and node._saved_reduction == 0 else None


def _names(text: str, number: int = 0) -> set[str]:
    return {f"{word}Backward{number}" for word in text.split()}


_RESHAPES = _names("View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias") | _names("Squeeze", 1) | _names("Squeeze", 2)
_ELEMENTWISE = (
    _names("Abs Add Addcdiv Addcmul Atan Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp Exp2 Expand Expm1")
    | _names("Gelu Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid Logaddexp MaskedFill Maximum")
    | _names("Minimum Mish Mul NativeDropout Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Sinh Softplus Softshrink Sqrt")
    | _names("Sub Tanh Threshold ToCopy Tril Triu Where Xlogy")
    | _names("Add Clamp ClampMax ClampMin Div Lerp Mul Pow Rsub Sub", 1)
)

_ATTENTION = {
    f"ScaledDotProduct{form}Backward0"
    for form in ("FlashAttention", "FlashAttentionForCpu", "EfficientAttention", "CudnnAttention")
}
# Positions of the inputs that a rule is for; the other inputs are weights. By default every input
_DATA: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_names("Convolution Mm NativeGroupNorm NativeLayerNorm NativeBatchNorm"), (0,)),
    **dict.fromkeys(_ATTENTION, (0, 1, 2)),
    "AddmmBackward0": (1,),
}
_RULES: dict[str, Callable[[Any, Shape, Shape, int], int | None]] = {
    **dict.fromkeys(_names("Softmax LogSoftmax SafeSoftmax Amax Amin Max Min Logsumexp LinalgVectorNorm Var Std"), _along),
    **dict.fromkeys(_names("Cumsum Glu Gather IndexSelect Select Unbind Split SplitWithSizes Cat Sort Topk"), _along),
    **dict.fromkeys(_names("Sum Mean Prod", 1), _along),
    **dict.fromkeys(_names("MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits"), _unreduced),
    **dict.fromkeys(_names("SoftMarginLoss"), _unreduced),
    **dict.fromkeys(_names("NllLoss NllLoss2D"), _unreduced_first),
    **dict.fromkeys(_names("AvgPool2D AdaptiveAvgPool2D AdaptiveMaxPool2D MaxPool2DWithIndices"), _pool),
    **dict.fromkeys(_names("UpsampleNearest2D UpsampleBilinear2D"), _pool),
    **dict.fromkeys(_names("Convolution Addmm Mm Bmm NativeGroupNorm"), _first),
    **dict.fromkeys(_ATTENTION, _attention),
    "SliceBackward0": _slice,
    "StackBackward0": _stack,
    "FlipBackward0": _flip,
    "TransposeBackward0": _transpose,
    "TBackward0": _matrix_transpose,
    "PermuteBackward0": _permute,
    "NativeLayerNormBackward0": _layer_norm,
    "ConstantPadNdBackward0": _pad,
    "NativeBatchNormBackward0": _batch_norm,
}
