"""Tensors in nested tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable


def map_leaves(function: Callable[[Any], Any], structure: Any) -> Any:
    """Apply a function to everything in a structure that is no tuple, list or mapping.

    Args:
        function: Function of one leaf.
        structure: Any nesting of tuples, named tuples, lists and mappings.

    Returns:
        The structure with the results as leaves. A mapping of a type that torch does not register becomes a dict.
    """
    if isinstance(structure, Tensor):  # the usual case, which needs no traversal
        return function(structure)

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return {name: map_leaves(function, part) for name, part in leaf.items()}
        if isinstance(leaf, list | tuple):
            return type(leaf)(map_leaves(function, part) for part in leaf)
        return function(leaf)

    return tree_map(visit, structure)


def leaves_of(structure: Any) -> list[Any]:
    """Return everything in a structure that is no tuple, list or mapping, from left to right."""
    collected: list[Any] = []
    map_leaves(collected.append, structure)
    return collected
