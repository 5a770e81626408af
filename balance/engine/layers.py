"""Weight gradients through a layer's inputs, and the cases in which that is cheaper.

A layer has N rows of inputs. If N is less than the length of a row, the weight gradient need not be formed for every task.
The gradient of the layer's output is shorter and determines it. The inner products of weight gradients can be computed in an
orthonormal basis of the space that the inputs span. In this basis a weight gradient is as long as the gradient of the output.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from .gramian import from_vector
from .nodes import LeafNode, has_hooks, is_packed, kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .gramian import SparseRows
    from .graph import Root, Trace

# Cost relative to one multiplication in a product of matrices, measured on a CPU and rounded
_MOVED = 20  # to move a number
_DOUBLE = 4  # to multiply in double precision
_DECOMPOSED = 2.5  # to multiply in a QR decomposition

_WEIGHT_INPUTS = {
    ("AddmmBackward0", 2),
    ("MmBackward0", 1),
    ("ConvolutionBackward0", 1),
}  # kind of node, position of the weight
_SAVED_INPUTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self", "ConvolutionBackward0": "_saved_input"}


class Layer(NamedTuple):
    """A linear or convolutional layer that is the only user of its weight.

    The gradient of the weight is therefore the product of the layer's inputs and of the gradient of its output.

    Attributes:
        weight: The weight.
        edge: The place at which the gradient of the layer's output arrives.
        shape: Shape of that gradient: (N, outputs), or (batch, channels, height, width).
        transposed: The layer used the transpose of the weight, as linear layers do.
    """

    weight: Tensor
    edge: GradientEdge
    shape: tuple[int, ...]
    transposed: bool

    @property
    def outputs(self) -> int:
        """Number of outputs, or of channels."""
        return self.shape[1]

    @property
    def samples(self) -> int:
        """N: rows of the batch, times positions of a convolution."""
        return math.prod(self.shape) // self.outputs

    @property
    def width(self) -> int:
        """Number of inputs to one output."""
        return self.weight.numel() // self.outputs

    def saved_inputs(self) -> Tensor:
        """Return the layer's inputs, which the graph keeps until its last backward pass."""
        inputs: Tensor = getattr(self.edge.node, _SAVED_INPUTS[kind(self.edge.node)]).detach()
        return inputs if inputs.layout == torch.strided else inputs.to_dense()

    def triangle(self, inputs: Tensor) -> Tensor:
        """Return R of the QR decomposition of the inputs, one column a sample. Shape (min(width, N), N), at least float32."""
        X = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if X.ndim == 4:
            node: Any = self.edge.node
            patches = functional.unfold(X, self.weight.shape[2:], node._saved_dilation, node._saved_padding, node._saved_stride)
            X = patches.movedim(1, -1).flatten(0, -2)  # rows by sample and position
        R: Tensor = torch.linalg.qr(X.T, mode="r").R
        return R

    def coordinates(self, triangle: Tensor, output_gradient: Tensor) -> Tensor:
        """Return the weight gradient in the basis of a QR decomposition.

        Args:
            triangle: R of that decomposition. Shape (min(width, N), N).
            output_gradient: Gradient of the layer's output. Shape ``shape``.

        Returns:
            Shape (min(width, N), outputs).
        """
        if output_gradient.ndim == 4:
            output_gradient = output_gradient.movedim(1, -1).flatten(0, -2)
        return triangle @ output_gradient.to(triangle)

    def weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """Return the weight gradient, in the shape of the weight.

        Args:
            inputs: Inputs of the layer.
            output_gradient: Gradient of the layer's output. Shape ``shape``.
        """
        inputs = inputs.to(output_gradient)
        if inputs.ndim == 4:
            node: Any = self.edge.node
            options = {"stride": node._saved_stride, "padding": node._saved_padding, "dilation": node._saved_dilation}
            gradient: Tensor = conv2d_weight(inputs, self.weight.shape, output_gradient, **options)  # type: ignore[no-untyped-call]
            return gradient
        return output_gradient.T @ inputs if self.transposed else inputs.T @ output_gradient


class MeasuredTensor(NamedTuple):
    """A tensor to differentiate with respect to, and the layer that yields its gradient, if any.

    Attributes:
        position: Index among the tensors on which conflict is measured.
        tensor: The tensor.
        layer: The layer whose weight it is; None if its gradients are computed directly.
        inputs: Inputs of the layer.
        sparse: Indices and shape of its gradients, if all of them are sparse.
        root: Factors on its coordinates, in its shape, of a metric other than the usual one; only without a layer.
    """

    position: int
    tensor: Tensor
    layer: Layer | None = None
    inputs: Tensor | None = None
    sparse: SparseRows | None = None
    root: Tensor | None = None

    @property
    def target(self) -> Root:
        """Tensor or edge at which a backward pass must arrive."""
        return self.tensor if self.layer is None else self.layer.edge

    @property
    def row_length(self) -> int:
        """Length of one task's row, in numbers."""
        return self.tensor.numel() if self.layer is None else self.layer.samples * self.layer.outputs

    def with_inputs(self) -> MeasuredTensor:
        """Return a copy that keeps the layer's inputs, which the graph loses with its last backward pass."""
        return self if self.layer is None else self._replace(inputs=self.layer.saved_inputs())

    def coordinates(self, rows: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the gradients in coordinates that preserve inner products, flat.

        Args:
            rows: By task, the gradient that arrived at `target`, flat.
        """
        if self.root is not None:
            root = self.root if self.sparse is None else self.sparse.values_of(self.root)
            flat = root.reshape(-1)
            return [None if row is None else row.to(torch.promote_types(row.dtype, torch.float32)) * flat for row in rows]
        if self.layer is None or self.inputs is None:
            return rows
        R = self.layer.triangle(self.inputs)
        return [None if row is None else self.layer.coordinates(R, row.view(self.layer.shape)).reshape(-1) for row in rows]

    def gradient(self, row: Tensor) -> Tensor:
        """Return the gradient of the tensor, given a row or a weighted sum of rows, flat."""
        if self.sparse is not None:
            return self.sparse.gradient(row)
        if self.layer is None or self.inputs is None:
            return from_vector(row, self.tensor)
        return self.layer.weight_gradient(self.inputs, row.view(self.layer.shape))


def measured_tensors(graph: Trace, tensors: Sequence[Tensor], num_tasks: int) -> list[MeasuredTensor]:
    """Return tensors with the layers through which their gradients are cheaper, if any.

    Args:
        graph: The graph that contains the tensors.
        tensors: Tensors to differentiate with respect to.
        num_tasks: Number of tasks, K.
    """
    by_position = layers(graph, tensors, num_tasks)
    return [MeasuredTensor(i, tensor, by_position.get(i)) for i, tensor in enumerate(tensors)]


def layers(graph: Trace, parameters: Sequence[Tensor], num_tasks: int | None = None) -> dict[int, Layer]:
    """Return the layers through which the gradients of parameters can be computed, by position in ``parameters``.

    Such a layer's weight gradient is provably the product of its inputs and the gradient that arrives. Hooks on the nodes
    between them rule a layer out. So do hooks that unpack saved tensors, as checkpointing and offloading use.

    Args:
        graph: The graph that contains the parameters.
        parameters: Leaf tensors.
        num_tasks: Number of tasks, K. Only layers that are cheaper for so many tasks are returned; None: all layers.
    """
    positions = {id(parameter): i for i, parameter in enumerate(parameters)}
    by_position = {}
    for node, users in graph.users.items():
        if type(node) is LeafNode and id(node.variable) in positions and len(users) == 1:
            layer = _layer(node.variable, *users[0], graph, num_tasks)
            if layer is not None:
                by_position[positions[id(node.variable)]] = layer
    return by_position


def is_cheaper(layer: Layer, num_tasks: int) -> bool:
    """Return whether the gradients of a layer's weight cost less through its inputs, for K tasks."""
    return layer.samples < layer.width and _cost_through_inputs(layer, num_tasks) < _direct_cost(layer, num_tasks)


def _direct_cost(layer: Layer, num_tasks: int) -> float:
    """Return the multiplications for the weight gradients and their inner products."""
    return num_tasks * layer.weight.numel() * (layer.samples + _MOVED + _DOUBLE * num_tasks)


def _cost_through_inputs(layer: Layer, num_tasks: int) -> float:
    """Return the multiplications through the gradients of the outputs, with the product that forms the final gradient."""
    N, P = layer.samples, layer.weight.numel()
    return _DECOMPOSED * N * N * layer.width + num_tasks * N * layer.outputs * (N + _MOVED + _DOUBLE * num_tasks) + N * P


def _layer(weight: Tensor, user: Any, position: int, graph: Trace, num_tasks: int | None) -> Layer | None:
    """Return the layer of a weight, given the only node that uses it; None if that is not certain or not cheaper."""
    transpose = user if user is not None and kind(user) == "TBackward0" and len(graph.users[user]) == 1 else None
    product, position = (user, position) if transpose is None else graph.users[transpose][0]
    if product is None or (kind(product), position) not in _WEIGHT_INPUTS or not _is_plain_product(product):
        return None
    shape = tuple(product._input_metadata[0].shape)
    if len(shape) not in (2, 4) or 0 in shape:
        return None
    layer = Layer(weight, GradientEdge(product, 0), shape, transpose is not None)
    if num_tasks is not None and not is_cheaper(layer, num_tasks):
        return None
    if is_packed(getattr(product, "_raw" + _SAVED_INPUTS[kind(product)])) or has_hooks(product):
        return None
    return layer if transpose is None or _is_plain_transpose(transpose, product) else None


def _is_plain_product(node: Any) -> bool:
    """Return whether the gradient of the weight is exactly the inputs times the gradients of the outputs."""
    if kind(node) == "AddmmBackward0":
        return bool(node._saved_alpha == 1)
    return kind(node) != "ConvolutionBackward0" or (node._saved_groups == 1 and not node._saved_transposed)


def _is_plain_transpose(transpose: Any, product: Any) -> bool:
    """Return whether no hook acts on a transposed weight: a hook is visible only if the product has saved that tensor."""
    if has_hooks(transpose) or is_packed(product._raw_saved_mat2):
        return False
    tensor = product._saved_mat2
    return tensor is not None and tensor.grad_fn is transpose and not tensor._backward_hooks and not tensor.retains_grad
