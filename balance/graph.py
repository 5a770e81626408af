"""Autograd's graph, read but not run: which leaves are below, and which parameters belong to layers whose inputs are known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.grad import conv2d_weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Root = Tensor | GradientEdge  # where a backward pass can begin


class Trace(NamedTuple):
    """What is below some roots, down to where the walk was told to stop."""

    leaves: list[Tensor]  # tensors that receive a gradient, in the order of the walk
    users: dict[Any, list[tuple[Any, int]]]  # by node: the nodes that take its output, and as which of their inputs
    disjoint: bool  # no two roots have a node in common, but for leaves


class Layer(NamedTuple):
    """A linear or convolutional layer that alone uses its weight, whose gradient is therefore outputs' gradients x inputs.

    With N rows of inputs, fewer than a row is long, that product need not be formed for every task: the gradient of the layer's
    output is shorter and says the same. Inner products of the weight's gradients are had in an orthonormal basis of the
    space that the inputs span, in which they are as long as the gradient of the output.
    """

    weight: Tensor
    edge: GradientEdge  # where the gradient of the layer's output arrives
    shape: tuple[int, ...]  # of that
    transposed: bool  # the weight was used as its transpose, as linear layers do

    @property
    def outputs(self) -> int:
        """Outputs of the layer, or channels."""
        return self.shape[1]

    @property
    def samples(self) -> int:
        """N: rows of the batch, times positions of a convolution."""
        return math.prod(self.shape) // self.outputs

    @property
    def width(self) -> int:
        """Inputs of one output."""
        return self.weight.numel() // self.outputs

    def inputs(self) -> Tensor:
        """What the layer was given, while the graph holds it."""
        found: Tensor = getattr(self.edge.node, _INPUTS[self.edge.node.name()]).detach()
        return found if found.layout == torch.strided else found.to_dense()

    def triangle(self, inputs: Tensor) -> Tensor:
        """R of the QR decomposition of the inputs, one column a sample. Shape (min(width, N), N), at least float32."""
        X = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if X.ndim == 4:
            node: Any = self.edge.node
            patches = functional.unfold(X, self.weight.shape[2:], node._saved_dilation, node._saved_padding, node._saved_stride)
            X = patches.movedim(1, -1).flatten(0, -2)  # rows by sample and position
        R: Tensor = torch.linalg.qr(X.T, mode="r").R
        return R

    def coordinates(self, triangle: Tensor, output_gradient: Tensor) -> Tensor:
        """The weight's gradient in that basis: R times the gradient of the output, one row a sample. Shape (·, outputs)."""
        if output_gradient.ndim == 4:
            output_gradient = output_gradient.movedim(1, -1).flatten(0, -2)
        return triangle @ output_gradient.to(triangle)

    def weight_gradient(self, inputs: Tensor, output_gradient: Tensor) -> Tensor:
        """The weight's gradient, of the shape of the weight."""
        inputs = inputs.to(output_gradient)
        if inputs.ndim == 4:
            node: Any = self.edge.node
            how = {"stride": node._saved_stride, "padding": node._saved_padding, "dilation": node._saved_dilation}
            found: Tensor = conv2d_weight(inputs, self.weight.shape, output_gradient, **how)  # type: ignore[no-untyped-call]
            return found
        return output_gradient.T @ inputs if self.transposed else inputs.T @ output_gradient


def edge(root: Root) -> GradientEdge:
    """Where the gradient of a tensor arrives."""
    return get_gradient_edge(root) if isinstance(root, Tensor) else root


def trace(roots: Iterable[Root | None], stop: Iterable[Tensor] = ()) -> Trace:
    """Walk the graph below some roots; ``stop`` are tensors below which it does not go."""
    ends = {(end.node, end.output_nr) for end in map(edge, stop)}
    leaves: dict[int, Tensor] = {}
    users: dict[Any, list[tuple[Any, int]]] = {}
    owners: dict[Any, int] = {}
    disjoint = True
    for number, root in enumerate(roots):
        if root is None or (isinstance(root, Tensor) and not root.requires_grad):
            continue
        start = edge(root)
        stack: list[tuple[Any, int, Any, int]] = [(start.node, start.output_nr, None, 0)]
        while stack:
            node, output, user, place = stack.pop()
            if ends and (node, output) in ends:
                continue
            owner = owners.get(node)
            if owner is None:
                owners[node] = number
                users[node] = [(user, place)]
                below = node.next_functions
                if below:
                    stack += [(after, nr, node, i) for i, (after, nr) in enumerate(below) if after is not None]
                elif hasattr(node, "variable"):
                    leaves[id(node.variable)] = node.variable
                continue
            users[node].append((user, place))
            disjoint = disjoint and (owner == number or hasattr(node, "variable"))
    return Trace(list(leaves.values()), users, disjoint)


def leaves(roots: Iterable[Root | None]) -> list[Tensor]:
    """Leaf tensors that receive a gradient from any root, in the order of a walk through the graph."""
    return trace(roots).leaves


def unstacked(losses: Tensor) -> list[Root | None] | None:
    """Where the gradients of scalars arrive that were put together by ``torch.stack``; None if that cannot be told.

    Backward passes that begin there do not visit the graphs of the other scalars.
    """
    node = losses.grad_fn
    if node is None or node.name() != "StackBackward0" or losses._backward_hooks or losses.retains_grad:
        return None
    below = node.next_functions
    if len(below) != len(losses) or losses.ndim != 1:
        return None
    if any(after is not None and not _is_alike(after, nr, losses) for after, nr in below):
        return None
    return [None if after is None else GradientEdge(after, nr) for after, nr in below]


def layers(found: Trace, parameters: Sequence[Tensor]) -> dict[int, Layer]:
    """The layers of those parameters whose gradients can be had from a layer's inputs, by place in ``parameters``."""
    wanted = {id(parameter): i for i, parameter in enumerate(parameters) if not parameter._backward_hooks}
    places = {}
    for node, users in found.users.items():
        if hasattr(node, "variable") and id(node.variable) in wanted and len(users) == 1:
            layer = _layer(node.variable, *users[0], found)
            if layer is not None:
                places[wanted[id(node.variable)]] = layer
    return places


def depths(found: Trace, parameters: Sequence[Tensor]) -> list[int]:
    """How late in the forward pass each parameter was used for the last time; -1 if it was not."""
    latest = {
        id(node.variable): max((user._sequence_nr() for user, _ in users if user is not None), default=-1)
        for node, users in found.users.items()
        if hasattr(node, "variable")
    }
    return [latest.get(id(parameter), -1) for parameter in parameters]


# Name of a node, and which of its inputs is the weight
_WEIGHTS = {("AddmmBackward0", 2), ("MmBackward0", 1), ("ConvolutionBackward0", 1)}
_INPUTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self", "ConvolutionBackward0": "_saved_input"}


def _layer(weight: Tensor, node: Any, place: int, found: Trace) -> Layer | None:
    transposed = node is not None and node.name() == "TBackward0" and len(found.users[node]) == 1
    if transposed:
        node, place = found.users[node][0]
    if node is None or (node.name(), place) not in _WEIGHTS or not _is_product(node):
        return None
    shape = tuple(node._input_metadata[0].shape)
    if len(shape) not in (2, 4) or 0 in shape:
        return None
    return Layer(weight, GradientEdge(node, 0), shape, transposed)


def activations(found: Trace) -> int:
    """About how many numbers the operations of a graph make."""
    nodes = [node for node in found.users if not hasattr(node, "variable") and node.name() != "TBackward0"]
    return sum(math.prod(made.shape) for node in nodes for made in node._input_metadata)


def _is_product(node: Any) -> bool:
    """Whether the gradient of the weight is nothing but inputs times output gradients."""
    if node.name() == "AddmmBackward0":
        return bool(node._saved_alpha == 1)
    return node.name() != "ConvolutionBackward0" or (node._saved_groups == 1 and not node._saved_transposed)


def _is_alike(node: Any, output: int, losses: Tensor) -> bool:
    """Whether a gradient that arrives there is a scalar like an entry of the losses."""
    if hasattr(node, "variable"):
        return False
    there = node._input_metadata[output]
    return tuple(there.shape) == () and there.dtype == losses.dtype and there.device == losses.device
