"""Partition of a network by its graph: shared parameters, heads, and the features where they meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ..distributed.sharding import is_distributed_tensor
from .graph import Root, Trace, edge, is_used, trace
from .trees import leaves_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..types import Source


class Partition(NamedTuple):
    """Leaves of the graph, and the tensors on which conflict is measured.

    Attributes:
        source: The kind of these tensors.
        inputs: Tensors on which conflict is measured: shared parameters, or features.
        trunk: Parameters that get the direction.
        heads: All other parameters that a loss reaches.
        features: Tensors that every path between heads and trunk goes through; empty if a path avoids the given ones.
        upper_graph: The graph above the features; the whole graph if there are none.
        lower_graph: The graph that contains the trunk.
    """

    source: Source
    inputs: list[Tensor]
    trunk: list[Tensor]
    heads: list[Tensor]
    features: list[Tensor]
    upper_graph: Trace
    lower_graph: Trace

    @property
    def functions(self) -> list[Any]:
        """Nodes of the graph that Python code defines."""
        return [*self.upper_graph.functions, *self.lower_graph.functions]

    @property
    def is_disjoint(self) -> bool:
        """Return whether the passes of two tasks down to the features run no operation in common."""
        # The engine also runs operations between a feature and another output of the operation that computed a second one
        users = (user for z in self.features for user, _ in self.lower_graph.users.get(edge(z).node, ()))
        return self.upper_graph.disjoint and all(user is None for user in users)


def partition_graph(
    source: Source,
    roots: Sequence[Root | None],
    shared: Iterable[Tensor] | None,
    features: Any,
    measure: Iterable[Tensor] | None,
    balancer_parameters: Iterable[Tensor],
) -> Partition:
    """Partition the leaves of a graph into trunk and heads.

    Args:
        source: Kind of the tensors on which conflict is measured.
        roots: By task, its loss in the graph; None for a loss without a graph.
        shared: The shared parameters; may be None with ``source="features"``.
        features: The shared representation, tensors in nested sequences or dicts; may be None with ``source="parameters"``.
        measure: The shared parameters on which conflict is measured; None: all.
        balancer_parameters: Parameters of the balancer, which belong neither to the trunk nor to the heads.

    Returns:
        The partition.

    Raises:
        ValueError: If an argument is missing, or two arguments exclude each other.
        TypeError: If an argument has the wrong type.
    """
    if source == "features":
        if measure is not None:
            raise ValueError('measure is for source="parameters", but got source="features". Leave it out.')
        return _partition_at_features(roots, shared, read_features(features), balancer_parameters)
    trunk = read_shared(shared)
    inputs = trunk if measure is None else _read_measure(measure, trunk)
    tensors = [] if features is None else read_features(features)
    return _partition_at_parameters(roots, inputs, trunk, tensors, balancer_parameters)


def _partition_at_features(
    roots: Sequence[Root | None],
    shared: Iterable[Tensor] | None,
    features: list[Tensor],
    balancer_parameters: Iterable[Tensor],
) -> Partition:
    upper, lower = trace(roots, stop=features), trace(features)
    trunk = _distinct([*_trainable(lower.leaves), *([] if shared is None else read_shared(shared))])
    excluded = _ids(trunk, balancer_parameters)
    is_bypassed = _reaches_any(upper, excluded)
    meeting = [] if _is_nested(features, lower) or is_bypassed else features
    return Partition("features", features, trunk, _heads(upper, excluded), meeting, upper, lower)


def _partition_at_parameters(
    roots: Sequence[Root | None],
    inputs: list[Tensor],
    trunk: list[Tensor],
    features: list[Tensor],
    balancer_parameters: Iterable[Tensor],
) -> Partition:
    upper = trace(roots, stop=features)
    lower = trace(features) if features else upper
    excluded = _ids(trunk, balancer_parameters)
    if features:
        is_below = all(id(leaf) in excluded for leaf in lower.leaves)
        if _is_nested(features, lower) or not is_below or _reaches_any(upper, excluded):
            features = []
            upper = lower = trace(roots)
    return Partition("parameters", inputs, trunk, _heads(upper, excluded), features, upper, lower)


def _heads(graph: Trace, excluded: set[int]) -> list[Tensor]:
    return [leaf for leaf in _trainable(graph.leaves) if id(leaf) not in excluded]


def _is_nested(features: Sequence[Tensor], lower_graph: Trace) -> bool:
    """Return whether a feature is computed from another one."""
    return any(is_used(lower_graph, z) for z in features)


def _reaches_any(graph: Trace, excluded: set[int]) -> bool:
    return any(id(leaf) in excluded for leaf in graph.leaves)


def _ids(trunk: Iterable[Tensor], balancer_parameters: Iterable[Tensor]) -> set[int]:
    return {id(tensor) for tensor in (*trunk, *balancer_parameters)}


def read_shared(shared: Iterable[Tensor] | None, name: str = "shared", *, measured: bool = True) -> list[Tensor]:
    """Return the shared parameters that require a gradient, each once.

    Args:
        shared: Parameters.
        name: Name of the argument, for messages.
        measured: Whether a gradient balancer measures their gradients, which must then be real and of one process.

    Returns:
        Leaf tensors; empty if all are frozen.

    Raises:
        ValueError: If there are no parameters.
        TypeError: If something is not a leaf tensor, or its gradients cannot be measured.
    """
    if isinstance(shared, nn.Module | Tensor) or not isinstance(shared, Iterable):
        value = "nothing" if shared is None else type(shared).__name__
        raise TypeError(f"{name} must be an iterable of parameters, but got {value}. Use {name}=model.trunk.parameters().")
    parameters = _distinct(shared)
    if not parameters:
        raise ValueError(f"{name} must hold parameters, but is empty. If it is a generator that was used up, give a list.")
    for parameter in parameters:
        _check_parameter(parameter, name, measured=measured)
    return [parameter for parameter in parameters if parameter.requires_grad]


def _check_parameter(parameter: object, name: str, *, measured: bool) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"{name} must hold parameters, but got {type(parameter).__name__}. Use {name}=model.trunk.parameters()."
        )
    if not parameter.is_leaf:
        raise TypeError(f"{name} must hold parameters, but got a computed tensor. If heads share it, give it as features.")
    if measured and is_distributed_tensor(parameter):
        raise TypeError(
            f"{name} must hold parameters of one process, but got a DTensor. Sharded parameters (FSDP2) can only be shared "
            'parameters, with source="parameters"; for anything else use balance.Splitter inside of the model.'
        )
    if measured and parameter.is_complex():
        raise TypeError(f"{name} must hold real parameters, but got a complex one. Keep its real view as the parameter.")


def read_features(features: Any, *, computed: bool = True) -> list[Tensor]:
    """Return the tensors of the shared representation, each once.

    Args:
        features: One tensor, or several in nested sequences or dicts; None in them is left out.
        computed: Whether they must require gradients.

    Returns:
        The tensors, in order.

    Raises:
        ValueError: If there is no tensor, or one does not require a gradient.
    """
    tensors = _distinct(leaf for leaf in leaves_of(features) if leaf is not None)
    if not tensors or not all(isinstance(z, Tensor) and (z.requires_grad or not computed) for z in tensors):
        raise ValueError(
            f"features must be one tensor or several that require gradients, but got {_described(tensors)}. Give the output of "
            "the shared trunk, from which the losses were computed."
        )
    return tensors


def _described(features: Sequence[Any]) -> str:
    wrong = next((z for z in features if not isinstance(z, Tensor)), None)
    if wrong is not None:
        return type(wrong).__name__
    return "a tensor that requires none" if features else "nothing"


def _read_measure(measure: Iterable[Tensor], trunk: Sequence[Tensor]) -> list[Tensor]:
    shared = {id(parameter) for parameter in trunk}
    chosen = read_shared(measure, "measure")
    if not chosen or any(id(parameter) not in shared for parameter in chosen):
        raise ValueError(
            f"measure must hold some of the shared parameters, but of its {len(chosen)} that require a gradient "
            f"{sum(id(parameter) in shared for parameter in chosen)} are in shared. Leave out all others."
        )
    return chosen


def _trainable(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Leave out leaves that have been frozen since the forward pass."""
    return [leaf for leaf in leaves if leaf.requires_grad]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
