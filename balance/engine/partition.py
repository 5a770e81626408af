"""Partition of a network by its graph: shared parameters, heads, and the features where they meet."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from balance.engine.graph import Root, Trace, edge, trace, uses
from balance.engine.trees import leaves_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from balance.types import Source


class Parts(NamedTuple):
    """Leaves of the graph, and where conflict is measured."""

    source: Source
    inputs: list[Tensor]  # where conflict is measured: shared parameters, or features
    trunk: list[Tensor]  # parameters that get the direction
    heads: list[Tensor]  # the others
    features: list[Tensor]  # where heads and trunk meet; empty where they do not meet in given features alone
    above: Trace  # of the graph above the features; of all of it where there are none
    below: Trace  # of the graph that holds the trunk

    @property
    def disjoint(self) -> bool:
        """Whether the passes of two tasks down to the features run no operation in common."""
        # The engine also runs what lies between one feature and another output of the operation that made a second one
        between = any(user is not None for z in self.features for user, _ in self.below.users.get(edge(z).node, ()))
        return self.above.disjoint and not between


def read_parts(
    source: Source,
    roots: Sequence[Root | None],
    shared: Iterable[Tensor] | None,
    features: object,
    measure: Iterable[Tensor] | None,
    own: Iterable[Tensor],
) -> Parts:
    """Partition the leaves of the graph.

    Args:
        source: Where conflict is measured.
        roots: Where the losses are in the graph.
        shared: The shared parameters; may be None with ``source="features"``.
        features: The shared representation; may be None with ``source="parameters"``.
        measure: Those of the shared parameters on which conflict is measured; None: all.
        own: The balancer's parameters.

    Raises:
        ValueError: If something is missing or does not go together.
        TypeError: If something is not what it should be.
    """
    if source == "features":
        if measure is not None:
            raise ValueError('measure is for source="parameters": with source="features" conflict is measured on the features.')
        inputs = tensors = read_features(features)
        above, below = trace(roots, stop=inputs), trace(inputs)
        trunk = _distinct([*_trainable(below.leaves), *([] if shared is None else read_shared(shared))])
    else:
        trunk = read_shared(shared)
        inputs = trunk if measure is None else _read_measure(measure, trunk)
        tensors = [] if features is None else read_features(features)
        above = trace(roots, stop=tensors)
        below = trace(tensors) if tensors else above
    of_trunk = {id(tensor) for tensor in (*trunk, *own)}
    nested = any(uses(below, edge(z)) for z in tensors)
    outside = source == "parameters" and any(id(leaf) not in of_trunk for leaf in below.leaves)
    bypassed = any(id(leaf) in of_trunk for leaf in above.leaves)
    if tensors and (nested or outside or bypassed):
        tensors = []
        if source == "parameters":
            above = below = trace(roots)
    heads = [leaf for leaf in _trainable(above.leaves) if id(leaf) not in of_trunk]
    return Parts(source, inputs, trunk, heads, tensors, above, below)


def read_shared(shared: Iterable[Tensor] | None, name: str = "shared", *, measured: bool = True) -> list[Tensor]:
    """Return the shared parameters that require a gradient, each once.

    Args:
        shared: Parameters.
        name: Name of the argument, for messages.
        measured: Whether a gradient balancer needs their gradients, which must then be real and of one process.

    Raises:
        ValueError: If there are none.
        TypeError: If something is not a leaf tensor, or its gradients cannot be measured.
    """
    if isinstance(shared, nn.Module | Tensor) or not isinstance(shared, Iterable):
        found = "nothing" if shared is None else type(shared).__name__
        raise TypeError(f"{name} must be an iterable of parameters, but got {found}. Use {name}=model.trunk.parameters().")
    parameters = list({id(p): p for p in shared}.values())
    if not parameters:
        raise ValueError(f"{name} must hold parameters, but is empty. Is it a generator that was used up? Give a list.")
    for parameter in parameters:
        if not isinstance(parameter, Tensor) or not parameter.is_leaf:
            raise TypeError(
                f"{name} must hold parameters, but got {type(parameter).__name__}"
                f"{' that is computed: give it as features' if isinstance(parameter, Tensor) else ''}."
            )
        if measured and _is_sharded(parameter):
            raise TypeError(
                f"{name} must hold parameters of one process, but got a DTensor (FSDP2, tensor parallelism): its gradients are "
                "reduced over ranks by hooks of an ordinary backward pass only. Use balance.Splitter inside the model, or "
                "gradient=None."
            )
        if measured and parameter.is_complex():
            raise TypeError(f"{name} must hold real parameters, but got a complex one. Keep its real view as the parameter.")
    return [parameter for parameter in parameters if parameter.requires_grad]


def read_features(features: Any, *, computed: bool = True) -> list[Tensor]:
    """Return the tensors of the shared representation, each once; they may come in sequences or dicts.

    Args:
        features: What a user gave.
        computed: They must require gradients.

    Raises:
        ValueError: If there is none, or one does not require a gradient.
    """
    tensors = list({id(z): z for z in leaves_of(features)}.values())
    if not tensors or not all(isinstance(z, Tensor) and (z.requires_grad or not computed) for z in tensors):
        raise ValueError(
            "features must be one tensor or several that require gradients: the output of the shared trunk, from which the "
            f"losses were computed. But got {_described(features)}."
        )
    return tensors


def _read_measure(measure: Iterable[Tensor], trunk: Sequence[Tensor]) -> list[Tensor]:
    shared = {id(parameter) for parameter in trunk}
    chosen = read_shared(measure, "measure")
    if not chosen or any(id(parameter) not in shared for parameter in chosen):
        raise ValueError(
            f"measure must hold some of the shared parameters, but of its {len(chosen)} that require a gradient "
            f"{sum(id(parameter) in shared for parameter in chosen)} are in shared."
        )
    return chosen


def _trainable(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Leave out leaves that have been frozen since the forward pass."""
    return [leaf for leaf in leaves if leaf.requires_grad]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_sharded(parameter: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: nothing is sharded
    return module is not None and isinstance(parameter, module.DTensor)


def _described(features: Any) -> str:
    if isinstance(features, Tensor):
        return "one that does not"
    return "nothing" if not leaves_of(features) else "others"
