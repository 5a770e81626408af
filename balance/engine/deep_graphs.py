"""Release of deep graphs without a stack overflow.

A graph that Python has walked is freed node by node in a recursion of torch, which overflows the stack if the graph is deep.
So the nodes of a deep graph are kept until nothing else refers to it, and then freed from the roots downwards.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .nodes import LeafNode, sequence_number

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_DEEP = 2000  # nodes
_released: list[list[Any]] = []  # nodes of graphs whose roots are gone, the deepest nodes first


class _Nodes:
    """Nodes of a deep graph, which its roots keep alive."""

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes

    def __del__(self) -> None:
        _released.append(self.nodes)


def keep_if_deep(nodes: Collection[Any], roots: Sequence[Any]) -> None:
    """Keep the nodes of a deep graph alive until `free_released_graphs` is called after the last of its roots is gone.

    Args:
        nodes: All nodes of the graph.
        roots: Nodes at which the walk through the graph began.
    """
    if len(nodes) <= _DEEP:
        return
    operations = [node for node in nodes if type(node) is not LeafNode]
    if len(operations) > _DEEP:
        starts = set(roots)
        keeper = _Nodes(sorted((node for node in operations if node not in starts), key=sequence_number))
        for root in starts:
            root.metadata.setdefault("balance", []).append(keeper)


def free_released_graphs() -> None:
    """Free the nodes of deep graphs to which nothing else refers any more."""
    graphs = list(_released)
    _released.clear()
    for nodes in graphs:
        in_use = []
        while nodes:
            node = nodes.pop()
            if sys.getrefcount(node) > 2:  # this name, the argument of the call, and another owner
                in_use.append(node)
        if in_use:
            _released.append(in_use[::-1])
