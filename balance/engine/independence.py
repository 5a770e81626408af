"""Proof, read from autograd's graph, that each loss of a vector depends on its own sample only.

One backward pass of the sum of such losses contains the gradients of all of them, each at its own sample. The proof goes from
the losses down to the tensors on which conflict is measured. Every operation between them must be one that keeps samples
apart, and every use of a measured parameter must have known gradients by sample. Whatever is not known is no proof. Examples
are functions that Python code defines, hooks, and saved tensors that hooks unpack.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.autograd.graph import GradientEdge

from .graph import edge
from .nodes import FunctionNode, LeafNode, has_hooks, is_packed, kind, saved_tensors
from .sample_axis import input_place
from .sample_gradients import use_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .graph import Trace
    from .sample_gradients import Use

_ENGINE: Any = torch.autograd.Variable._execution_engine
_WEIGHT_MOVES = ("TBackward0", "ToCopyBackward0")  # a linear layer transposes its weight, autocast casts it
_WEIGHT = ("AddmmBackward0", 2)
_End = tuple[Any, int]  # node and number of the output


class SampleGraph(NamedTuple):
    """The part of a graph between B losses and some tensors, in which samples are proved to be independent.

    Attributes:
        uses: By position of a measured parameter, its uses; all of them are in this graph.
        places: By position of a measured tensor that is no parameter, the distance of its samples in row-major order.
        lowest: Nodes of uses below which there is no other use.
        biased: Positions of weights of linear layers whose bias is measured with them, and is not in ``uses``.
        reached: Positions of all measured tensors that the losses reach.
    """

    uses: Mapping[int, Sequence[Use]]
    places: Mapping[int, int]
    lowest: Sequence[Any]
    biased: set[int]
    reached: set[int]


def independent_samples(losses: Tensor, graph: Trace, measured: Sequence[Tensor], *, at_features: bool) -> SampleGraph | None:
    """Return the graph between losses and measured tensors if its samples are proved to be independent.

    Args:
        losses: One loss for each sample. Shape (B,).
        graph: The graph below the losses, down to the measured tensors.
        measured: Leaf tensors, or features at which the graph ends.
        at_features: The measured tensors are features.

    Returns:
        None if there is no proof.
    """
    walk = _Walk(losses, graph, measured, at_features=at_features)
    return walk.result() if walk.is_proved() else None


class _Walk:
    """Walk from the losses to the measured tensors.

    Attributes:
        positions: By node and output, the positions of the measured tensors.
        needed: Nodes with a path to a measured tensor.
    """

    def __init__(self, losses: Tensor, graph: Trace, measured: Sequence[Tensor], *, at_features: bool) -> None:
        self.losses, self.graph, self.at_features = losses, graph, at_features
        ends = [(end.node, end.output_nr) for end in map(edge, measured)]
        self.positions: dict[_End, int] = {end: i for i, end in enumerate(ends)}
        starts: list[Any] = (
            [entrance.user for entrance in graph.entrances]
            if at_features
            else [node for node, _ in ends if node in graph.users]
        )
        self.needed = self._above(starts)
        self.inner: dict[_End, int] = {}  # place of the samples, by node and output
        self.uses: dict[int, list[Use]] = {}
        self.places: dict[int, int] = {}

    def _above(self, starts: Sequence[Any]) -> dict[Any, int]:
        """Return the nodes with a path to any of some nodes, each with the number of its uses by such nodes."""
        counts: dict[Any, int] = {}
        stack = [node for node in starts if node is not None]
        while stack:
            node = stack.pop()
            if node in counts:
                continue
            counts[node] = 0
            stack += [user for user, _ in self.graph.users[node] if user is not None]
        for node in counts:
            counts[node] = sum(user is not None for user, _ in self.graph.users[node])
        return counts

    def is_proved(self) -> bool:
        """Return whether samples are independent; every node comes after all nodes that use it."""
        root, B = edge(self.losses), len(self.losses)
        if B < 2 or not self._is_plain_root(root):
            return False
        self.inner[root.node, root.output_nr] = 1
        waiting, ready = dict(self.needed), [cast("Any", root.node)]
        while ready:
            node = ready.pop()
            if type(node) is LeafNode or self._leaf_below(node) is not None:
                continue  # its user has looked at it
            if _is_complex(node) or any(map(is_packed, saved_tensors(node))):
                return False
            if not all(self._follow(node, position) for position in range(len(node.next_functions))):
                return False
            inputs: list[_End] = [end for end in node.next_functions if not (self.at_features and end in self.positions)]
            for below, _ in inputs:
                waiting[below] = waiting.get(below, 0) - 1
            ready += [below for below in dict.fromkeys(below for below, _ in inputs) if waiting[below] == 0]
        return self._has_all_uses() and self._is_transparent()

    def _is_transparent(self) -> bool:
        """Return whether no Python code acts on a gradient in the graph."""
        nodes = [node for node in self.graph.users if type(node) is not LeafNode]
        if any(isinstance(node, FunctionNode) or has_hooks(node) for node in nodes):
            return False
        return not any(_has_tensor_hooks(node, i) for node in nodes for i in range(len(node._input_metadata)))

    def _is_plain_root(self, root: GradientEdge) -> bool:
        """Return whether the walk can begin at the losses, and no other node of the graph uses them."""
        return self.losses.ndim == 1 and self.needed.get(root.node) == 0 and type(root.node) is not LeafNode

    def _has_all_uses(self) -> bool:
        """Return whether every reached measured parameter was looked at in all its uses."""
        if self.at_features:
            return True
        reached = [node for node, _ in self.positions if node in self.graph.users]
        return all(self.positions[node, 0] in self.uses for node in reached)

    def _follow(self, node: Any, position: int) -> bool:
        """Follow one input of a node; return False if that is not certain to keep samples apart."""
        below, number = node.next_functions[position]
        is_end = (below, number) in self.positions
        if below is None or not (is_end or below in self.needed):
            return True  # no measured tensor depends on this input
        leaf = None if self.at_features and is_end else self._leaf_below(below)
        if leaf is not None:
            return self._note_use(node, position, below, leaf)
        given = tuple(below._input_metadata[number].shape)
        places = {self._input_place(node, position, i, given) for i in range(len(node._input_metadata))} - {-1}
        place = places.pop() if len(places) == 1 else None
        if place is None or self.inner.setdefault((below, number), place) != place:
            return False
        if is_end and self.at_features:
            self.places[self.positions[below, number]] = place
        return True

    def _input_place(self, node: Any, position: int, output: int, given: tuple[int, ...]) -> int | None:
        """Return the place of the samples in an input, given one output of the node; -1 if that output is not used."""
        inner = self.inner.get((node, output))
        if inner is None:
            return -1
        shape = tuple(node._input_metadata[output].shape)
        return input_place(node, position, shape, given, inner, len(self.losses))

    def _leaf_below(self, node: Any) -> Tensor | None:
        """Return the measured leaf tensor that a node is, or that it transposes or casts."""
        while kind(node) in _WEIGHT_MOVES:
            node = node.next_functions[0][0]
        is_leaf = type(node) is LeafNode and not self.at_features and (node, 0) in self.positions
        return node.variable if is_leaf else None

    def _note_use(self, node: Any, position: int, below: Any, leaf: Tensor) -> bool:
        inner, is_transposed = self.inner.get((node, 0)), False
        while type(below) is not LeafNode:
            is_transposed ^= kind(below) == "TBackward0"
            below = below.next_functions[0][0]
        if inner is None:
            return False
        use = use_of(node, position, leaf, transposed=is_transposed, inner=inner, num_samples=len(self.losses))
        if use is None:
            return False
        self.uses.setdefault(self.positions[edge(leaf).node, 0], []).append(use)
        return True

    def result(self) -> SampleGraph:
        """Return the graph that was walked."""
        biases = self._biases()
        reached = {*self.uses, *self.places}
        for bias in biases.values():
            del self.uses[bias]
        nodes = {use.node for uses in self.uses.values() for use in uses}
        above = set(self._above([user for node in nodes for user, _ in self.graph.users[node]]))
        return SampleGraph(self.uses, self.places, [node for node in nodes if node not in above], set(biases), reached)

    def _biases(self) -> dict[int, int]:
        """Return by position of the weight of a linear layer the position of its bias, if both have no other use."""
        single = {(uses[0].node, uses[0].position): i for i, uses in self.uses.items() if len(uses) == 1}
        pairs = [(i, single.get((node, 0))) for (node, position), i in single.items() if (kind(node), position) == _WEIGHT]
        return {weight: bias for weight, bias in pairs if bias is not None and self._is_full(bias)}

    def _is_full(self, bias: int) -> bool:
        """Return whether a bias has a number for each output of its layer."""
        use = self.uses[bias][0]
        outputs: tuple[int, ...] = tuple(use.node._input_metadata[0].shape[1:])
        return tuple(use.leaf.shape) == outputs


class _Probe(torch.Tensor):
    """A gradient of zero that notes whether any function gets it."""

    seen = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen = True
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _is_complex(node: Any) -> bool:
    return any(metadata.dtype.is_complex for metadata in node._input_metadata)


@lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _has_tensor_hooks(node: Any, output: int) -> bool:
    """Return whether a hook acts on the gradient of an output.

    Torch does not list the hooks of a tensor from its node. So a gradient of zero passes through them, which notes whether a
    hook uses or replaces it. A hook that does neither cannot act on the gradient.
    """
    metadata, _Probe.seen = node._input_metadata[output], False
    zero = _zero(metadata.dtype, metadata.device).expand(metadata.shape).as_subclass(_Probe)
    place = (GradientEdge(node, output),)
    options = {"keep_graph": True, "create_graph": False, "allow_unreachable": True, "accumulate_grad": False}
    try:  # torch.autograd.grad itself would look at the gradient
        (arrived,) = _ENGINE.run_backward(place, (zero,), inputs=place, **options)
    except Exception:  # noqa: BLE001 - a hook may refuse a gradient of zero in any way
        return True
    if _Probe.seen:
        _zero.cache_clear()  # the hook may have changed it
    return _Probe.seen or arrived is not zero
