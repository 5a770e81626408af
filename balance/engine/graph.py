"""Traversal of autograd's graph: the leaves below some roots, and the layers whose inputs are known. Nothing is run here."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.grad import conv2d_weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Root = Tensor | GradientEdge  # where a backward pass can begin

# A node is recognised by its type alone: a custom Function may store anything under any attribute of its node
_Leaf: Any = type(get_gradient_edge(torch.zeros((), device="cpu", requires_grad=True)).node)
_Function: Any = torch._C._FunctionBase


class Trace(NamedTuple):
    """The graph below some roots, down to the tensors at which the walk stops."""

    leaves: list[Tensor]  # tensors that receive a gradient, in the order of the walk
    users: dict[Any, list[tuple[Any, int]]]  # by node: the nodes that take its output, and as which of their inputs
    disjoint: bool  # no two roots have a node in common, but for leaves
    functions: list[Any]  # nodes that Python code defines
    entrances: list[Any]  # nodes that use a tensor at which the walk stops


class Layer(NamedTuple):
    """A linear or convolutional layer that alone uses its weight, whose gradient is therefore outputs' gradients x inputs.

    With N rows of inputs, fewer than a row is long, that product need not be formed for every task: the gradient of the layer's
    output is shorter and says the same. Inner products of the weight's gradients are had in an orthonormal basis of the
    space that the inputs span, in which they are as long as the gradient of the output.
    """

    weight: Tensor
    edge: GradientEdge  # the place at which the gradient of the layer's output arrives
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
        """Return the layer's input, which the graph must still hold."""
        found: Tensor = getattr(self.edge.node, _INPUTS[_kind(self.edge.node)]).detach()
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
    """Return the place at which the gradient of a tensor arrives."""
    return get_gradient_edge(root) if isinstance(root, Tensor) else root


def trace(roots: Iterable[Root | None], stop: Iterable[Tensor] = ()) -> Trace:
    """Walk the graph below some roots; ``stop`` are tensors below which it does not go."""
    release_graphs()
    ends = {(end.node, end.output_nr) for end in map(edge, stop)}
    found = Trace([], {}, disjoint=True, functions=[], entrances=[])
    owners: dict[Any, int] = {}
    starts = []
    for number, root in enumerate(roots):
        if root is None or (isinstance(root, Tensor) and not root.requires_grad):
            continue
        start = edge(root)
        starts.append(start.node)
        if _walk(start, number, ends, owners, found):
            found = found._replace(disjoint=False)
    _hold_if_deep(found.users, starts)
    return found


def _walk(start: GradientEdge, number: int, ends: set[Any], owners: dict[Any, int], found: Trace) -> bool:
    """Walk below one root; return whether a node, other than a leaf, belongs to an earlier root too."""
    meets = False
    stack: list[tuple[Any, int, Any, int]] = [(start.node, start.output_nr, None, 0)]
    while stack:
        node, output, user, place = stack.pop()
        if ends and (node, output) in ends:
            found.entrances.append(user)
            continue
        owner = owners.get(node)
        if owner is None:
            owners[node] = number
            found.users[node] = [(user, place)]
            if type(node) is _Leaf:
                found.leaves.append(node.variable)
                continue
            if isinstance(node, _Function):
                found.functions.append(node)
            stack += [(below, nr, node, i) for i, (below, nr) in enumerate(node.next_functions) if below is not None]
            continue
        found.users[node].append((user, place))
        meets = meets or (owner != number and type(node) is not _Leaf)
    return meets


def uses(found: Trace, tensor: GradientEdge) -> bool:
    """Whether a node of the graph uses a tensor; another output of the same operation is another tensor."""
    users = [(user, place) for user, place in found.users.get(tensor.node, ()) if user is not None]
    return any(user.next_functions[place][1] == tensor.output_nr for user, place in users)


def leaves(roots: Iterable[Root | None]) -> list[Tensor]:
    """Leaf tensors that receive a gradient from any root, in the order of a walk through the graph."""
    return trace(roots).leaves


class Reach:
    """Which roots have a path to a node, read from a graph that was walked below them.

    Args:
        found: The graph.
        roots: The roots that the walk began at.
    """

    def __init__(self, found: Trace, roots: Sequence[Root | None]) -> None:
        self._found, self._count = found, len(roots)
        self._own: dict[Any, int] = {}  # by node, the roots that stand there, as bits
        for k, root in enumerate(roots):
            if root is not None:
                node = edge(root).node
                self._own[node] = self._own.get(node, 0) | 1 << k
        self._above: dict[Any, int] = {}

    def of(self, target: Root) -> list[bool]:
        """Return for each root whether it has a path to a tensor or an edge."""
        return self._listed(self._bits(edge(target).node))

    def of_any(self, tensors: Iterable[Tensor]) -> list[bool]:
        """Return the same for a path to any of some leaf tensors, or to a tensor at which the walk stopped."""
        bits = 0
        for node in (*(edge(tensor).node for tensor in tensors), *self._found.entrances):
            bits |= self._bits(node)
        if None in self._found.entrances:  # a root is itself a tensor at which the walk stopped
            bits |= sum(own for node, own in self._own.items() if node not in self._found.users)
        return self._listed(bits)

    def _listed(self, bits: int) -> list[bool]:
        return [bool(bits >> k & 1) for k in range(self._count)]

    def _bits(self, target: Any) -> int:
        stack = [target]
        while stack:
            node = stack[-1]
            users = [user for user, _ in self._found.users.get(node, ()) if user is not None]
            missing = [user for user in users if user not in self._above]
            if missing and node not in self._above:
                stack += missing
                continue
            stack.pop()
            if node not in self._above:
                bits = self._own.get(node, 0) if node in self._found.users else 0
                for user in users:
                    bits |= self._above[user]
                self._above[node] = bits
        return self._above[target]


def unstacked(losses: Tensor) -> list[Root | None] | None:
    """Return where the gradients of scalars arrive that ``torch.stack`` put together; None if that cannot be told.

    Backward passes that begin there do not visit the graphs of the other scalars.
    """
    node = losses.grad_fn
    if node is None or _kind(node) != "StackBackward0" or losses._backward_hooks or losses.retains_grad or _has_hooks(node):
        return None
    below = node.next_functions
    if len(below) != len(losses) or losses.ndim != 1:
        return None
    if any(after is not None and not _is_alike(after, nr, losses) for after, nr in below):
        return None
    return [None if after is None else GradientEdge(after, nr) for after, nr in below]


def layers(found: Trace, parameters: Sequence[Tensor], pays: Any = lambda _: True) -> dict[int, Layer]:
    """Return the layers through which the gradients of parameters can be computed, by place in ``parameters``.

    A layer is taken only where its weight's gradient is provably the product of its input and the gradient that arrives:
    no hook on the nodes in between, and no hook that unpacks what the graph has saved (checkpointing, offloading).

    Args:
        found: The graph that holds the parameters.
        parameters: Leaf tensors.
        pays: Called with a layer; whether to take it.
    """
    wanted = {id(parameter): i for i, parameter in enumerate(parameters)}
    places = {}
    for node, users in found.users.items():
        if type(node) is _Leaf and id(node.variable) in wanted and len(users) == 1:
            layer = _layer(node.variable, *users[0], found, pays)
            if layer is not None:
                places[wanted[id(node.variable)]] = layer
    return places


def depths(found: Trace, parameters: Sequence[Tensor]) -> list[int]:
    """Return how late in the forward pass each parameter was used for the last time; -1 if it was not."""
    latest = {
        id(node.variable): max((_sequence_number(user) for user, _ in users if user is not None), default=-1)
        for node, users in found.users.items()
        if type(node) is _Leaf
    }
    return [latest.get(id(parameter), -1) for parameter in parameters]


def unpacks(found: Trace) -> bool:
    """Whether hooks unpack saved tensors in this graph, as checkpointing and offloading do: every pass pays for them."""
    return any(
        _is_packed(saved)
        for node in found.users
        if type(node) is not _Leaf
        for name in _saved_names(type(node))
        for saved in _as_tuple(getattr(node, name))
    )


# Kind of a node, and which of its inputs is the weight
_WEIGHTS = {("AddmmBackward0", 2), ("MmBackward0", 1), ("ConvolutionBackward0", 1)}
_INPUTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self", "ConvolutionBackward0": "_saved_input"}


_SAVED: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # names of what a kind of node saves


def _kind(node: Any) -> str:
    """Return the kind of one of torch's own nodes; an empty text for nodes that Python code defines."""
    return "" if isinstance(node, _Function) else type(node).__name__


def _layer(weight: Tensor, node: Any, place: int, found: Trace, pays: Any) -> Layer | None:
    turned = node if node is not None and _kind(node) == "TBackward0" and len(found.users[node]) == 1 else None
    if turned is not None:
        node, place = found.users[turned][0]
    if node is None or (_kind(node), place) not in _WEIGHTS or not _is_product(node):
        return None
    shape = tuple(node._input_metadata[0].shape)
    if len(shape) not in (2, 4) or 0 in shape:
        return None
    layer = Layer(weight, GradientEdge(node, 0), shape, turned is not None)
    if not pays(layer) or _is_packed(getattr(node, "_raw" + _INPUTS[_kind(node)])) or _has_hooks(node):
        return None
    return layer if turned is None or _is_plain_transpose(turned, node) else None


def _is_plain_transpose(turned: Any, product: Any) -> bool:
    """Whether no hook acts on a transposed weight: the product must have saved the very tensor, so that its hooks show."""
    if _has_hooks(turned) or _is_packed(product._raw_saved_mat2):
        return False
    tensor = product._saved_mat2
    return tensor is not None and tensor.grad_fn is turned and not tensor._backward_hooks and not tensor.retains_grad


def _has_hooks(node: Any) -> bool:
    """Whether Python code has registered hooks on a node: all of them share the dict that a further handle refers to."""
    for register in (node.register_prehook, node.register_hook):
        handle = register(_no_change)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:
            return True
    return False


def _no_change(*_: Any) -> None:
    """Leave a gradient as it is."""


def _is_packed(saved: Any) -> bool:
    # Without the attribute (an older torch) nobody can tell, so the answer must be the safe one
    return saved is not None and getattr(saved, "unpack_hook", _no_change) is not None


def _saved_names(kind: type) -> tuple[str, ...]:
    names = _SAVED.get(kind)
    if names is None:
        names = _SAVED[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return names


def _as_tuple(saved: Any) -> tuple[Any, ...]:
    return tuple(saved) if isinstance(saved, list | tuple) else (saved,)


def _sequence_number(node: Any) -> int:
    number: int = _Function._sequence_nr(node) if isinstance(node, _Function) else node._sequence_nr()
    return number


def activations(found: Trace) -> int:
    """Return about how many numbers the operations of a graph make."""
    nodes = [node for node in found.users if type(node) is not _Leaf and _kind(node) != "TBackward0"]
    return sum(math.prod(made.shape) for node in nodes for made in node._input_metadata)


def _is_product(node: Any) -> bool:
    """Whether the gradient of the weight is exactly inputs times output gradients."""
    if _kind(node) == "AddmmBackward0":
        return bool(node._saved_alpha == 1)
    return _kind(node) != "ConvolutionBackward0" or (node._saved_groups == 1 and not node._saved_transposed)


def _is_alike(node: Any, output: int, losses: Tensor) -> bool:
    """Whether a gradient that arrives there is a scalar like an entry of the losses; the engine casts it if need be."""
    if type(node) is _Leaf:
        return False
    there = node._input_metadata[output]
    return tuple(there.shape) == () and there.device == losses.device and there.dtype.is_floating_point


# A graph that Python has walked is freed node by node in a recursion of torch, which overflows the stack if the graph is
# deep. So the nodes of a deep graph are kept until nothing else refers to it, and then freed from the roots downwards.
_DEEP = 2000  # nodes
_abandoned: list[list[Any]] = []


class _Nodes:
    """Nodes of a deep graph, held by its roots."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes

    def __del__(self) -> None:
        _abandoned.append(self.nodes)


def _hold_if_deep(nodes: Iterable[Any], roots: Sequence[Any]) -> None:
    below = [node for node in nodes if type(node) is not _Leaf]
    if len(below) > _DEEP:
        starts = set(roots)
        held = _Nodes(sorted((node for node in below if node not in starts), key=_sequence_number))
        for root in starts:
            root.metadata.setdefault("balance", []).append(held)


def release_graphs() -> None:
    """Free the nodes of deep graphs to which nothing else refers any more."""
    pending = list(_abandoned)
    _abandoned.clear()
    for nodes in pending:
        kept = []
        while nodes:
            node = nodes.pop()
            if sys.getrefcount(node) > 2:  # this name, the call's argument, and somebody else
                kept.append(node)
        if kept:
            _abandoned.append(kept[::-1])
