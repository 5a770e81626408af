"""Traversal of autograd's graph. Nothing is computed here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .deep_graphs import free_released_graphs, keep_if_deep
from .nodes import FunctionNode, LeafNode, has_hooks, is_packed, kind, saved_tensors, sequence_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Root = Tensor | GradientEdge  # where a backward pass can begin


class Entrance(NamedTuple):
    """A use of a tensor at which a walk stops.

    Attributes:
        user: The node that uses it; None for a root that is such a tensor.
        position: Number of that input of the node.
        root: Number of the first root that reaches the node.
        end: Node and output that compute the tensor.
    """

    user: Any
    position: int
    root: int
    end: tuple[Any, int]


class Trace(NamedTuple):
    """The graph below some roots, down to the tensors at which the walk stops.

    Attributes:
        leaves: Tensors that receive a gradient, in the order of the walk.
        users: By node, the nodes that take its output, each with the position of that input.
        disjoint: No two roots have a node in common, except for leaves.
        functions: Nodes that Python code defines.
        entrances: Uses of the tensors at which the walk stops.
        owners: By node, the number of the first root that reaches it.
    """

    leaves: list[Tensor]
    users: dict[Any, list[tuple[Any, int]]]
    disjoint: bool
    functions: list[Any]
    entrances: list[Entrance]
    owners: dict[Any, int]


def edge(root: Root) -> GradientEdge:
    """Return the place at which the gradient of a tensor arrives."""
    if not isinstance(root, Tensor):
        return root
    node = root.grad_fn
    return get_gradient_edge(root) if node is None else GradientEdge(node, root.output_nr)


def trace(roots: Iterable[Root | None], stop: Iterable[Tensor] = ()) -> Trace:
    """Walk through the graph below some roots.

    Args:
        roots: Tensors or edges; None and tensors without a graph are skipped.
        stop: Tensors below which the walk does not continue.

    Returns:
        The nodes that the walk visited.
    """
    free_released_graphs()
    ends = {(end.node, end.output_nr) for end in map(edge, stop)}
    graph = Trace([], {}, disjoint=True, functions=[], entrances=[], owners={})
    starts = []
    for number, root in enumerate(roots):
        if root is None or (isinstance(root, Tensor) and not root.requires_grad):
            continue
        start = edge(root)
        starts.append(start.node)
        if _walk(start, number, ends, graph):
            graph = graph._replace(disjoint=False)
    keep_if_deep(graph.users, starts)
    return graph


def _walk(start: GradientEdge, number: int, ends: set[Any], graph: Trace) -> bool:
    """Walk below one root; return whether a node, other than a leaf, belongs to an earlier root too."""
    overlaps, owners = False, graph.owners
    stack: list[tuple[Any, int, Any, int]] = [(start.node, start.output_nr, None, 0)]
    while stack:
        node, output, user, position = stack.pop()
        if ends and (node, output) in ends:
            graph.entrances.append(Entrance(user, position, number, (node, output)))
            continue
        owner = owners.get(node)
        if owner is None:
            owners[node] = number
            graph.users[node] = [(user, position)]
            if type(node) is LeafNode:
                graph.leaves.append(node.variable)
                continue
            if isinstance(node, FunctionNode):
                graph.functions.append(node)
            stack += [(below, nr, node, i) for i, (below, nr) in enumerate(node.next_functions) if below is not None]
            continue
        graph.users[node].append((user, position))
        overlaps = overlaps or (owner != number and type(node) is not LeafNode)
    return overlaps


def is_used(graph: Trace, tensor: Tensor) -> bool:
    """Return whether a node of the graph uses a tensor; another output of the same operation is another tensor."""
    target = edge(tensor)
    users = [(user, position) for user, position in graph.users.get(target.node, ()) if user is not None]
    return any(user.next_functions[position][1] == target.output_nr for user, position in users)


def leaves(roots: Iterable[Root | None]) -> list[Tensor]:
    """Return the leaf tensors that receive a gradient from any root, in the order of a walk through the graph."""
    return trace(roots).leaves


class Reachability:
    """Paths from roots to other nodes of a graph.

    Args:
        graph: The graph below the roots.
        roots: The roots at which its walk began; R of them.
    """

    def __init__(self, graph: Trace, roots: Sequence[Root | None]) -> None:
        self._graph, self._count = graph, len(roots)
        self._roots: dict[Any, int] = {}  # by node, the roots that this node is, as bits
        for number, root in enumerate(roots):
            if root is not None:
                node = edge(root).node
                self._roots[node] = self._roots.get(node, 0) | 1 << number
        self._reaching: dict[Any, int] = {}  # by node, the roots that have a path to it, as bits

    def roots_reaching(self, target: Root) -> list[bool]:
        """Return for each root whether it has a path to a tensor or an edge. Length R."""
        return self._as_list(self._bits(edge(target).node))

    def indices_reaching(self, target: Root) -> Iterator[int]:
        """Yield the indices of the roots that have a path to a tensor or an edge."""
        bits = self._bits(edge(target).node)
        while bits:
            lowest = bits & -bits
            yield lowest.bit_length() - 1
            bits ^= lowest

    def roots_reaching_any(self, tensors: Iterable[Tensor]) -> list[bool]:
        """Return for each root whether it has a path to any of some tensors.

        Args:
            tensors: Leaf tensors, or the tensors at which the walk stopped.

        Returns:
            Length R.
        """
        bits = 0
        users = [entrance.user for entrance in self._graph.entrances]
        for node in (*(edge(tensor).node for tensor in tensors), *users):
            bits |= self._bits(node)
        if None in users:  # a root is itself a tensor at which the walk stopped
            bits |= sum(root_bits for node, root_bits in self._roots.items() if node not in self._graph.users)
        return self._as_list(bits)

    def _as_list(self, bits: int) -> list[bool]:
        return [bool(bits >> k & 1) for k in range(self._count)]

    def _bits(self, target: Any) -> int:
        stack = [target]
        while stack:
            node = stack[-1]
            users = [user for user, _ in self._graph.users.get(node, ()) if user is not None]
            missing = [user for user in users if user not in self._reaching]
            if missing and node not in self._reaching:
                stack += missing
                continue
            stack.pop()
            if node not in self._reaching:
                bits = self._roots.get(node, 0) if node in self._graph.users else 0
                for user in users:
                    bits |= self._reaching[user]
                self._reaching[node] = bits
        return self._reaching[target]


def unstacked_roots(losses: Tensor) -> list[Root | None] | None:
    """Return the places at which the gradients of scalars arrive that ``torch.stack`` has joined.

    Backward passes that begin there do not visit the graphs of the other scalars.

    Args:
        losses: A vector. Shape (K,).

    Returns:
        By entry of the vector, None for a constant; None if anything other than a plain stack computed the vector.
    """
    node = losses.grad_fn
    if node is None or kind(node) != "StackBackward0" or losses._backward_hooks or losses.retains_grad or has_hooks(node):
        return None
    inputs = node.next_functions
    if len(inputs) != len(losses) or losses.ndim != 1:
        return None
    if any(below is not None and not _is_alike(below, nr, losses) for below, nr in inputs):
        return None
    return [None if below is None else GradientEdge(below, nr) for below, nr in inputs]


def _is_alike(node: Any, output: int, losses: Tensor) -> bool:
    """Return whether the gradient of an output is a scalar like an entry of the losses; the engine casts it if need be."""
    if type(node) is LeafNode:
        return False
    metadata = node._input_metadata[output]
    return tuple(metadata.shape) == () and metadata.device == losses.device and metadata.dtype.is_floating_point


def last_uses(graph: Trace, parameters: Sequence[Tensor]) -> list[int]:
    """Return for each parameter the place in the forward pass of its last use; -1 if it was not used."""
    latest = {
        id(node.variable): max((sequence_number(user) for user, _ in users if user is not None), default=-1)
        for node, users in graph.users.items()
        if type(node) is LeafNode
    }
    return [latest.get(id(parameter), -1) for parameter in parameters]


def unpacks_saved_tensors(graph: Trace) -> bool:
    """Return whether every pass runs hooks that unpack saved tensors, as checkpointing and offloading use."""
    nodes = (node for node in graph.users if type(node) is not LeafNode)
    return any(is_packed(saved) for node in nodes for saved in saved_tensors(node))


def activation_count(graph: Trace) -> int:
    """Return approximately how many numbers the operations of a graph compute."""
    nodes = [node for node in graph.users if type(node) is not LeafNode and kind(node) != "TBackward0"]
    return sum(math.prod(output.shape) for node in nodes for output in node._input_metadata)
