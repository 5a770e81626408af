"""One backward pass for all tasks down to the features, where no two tasks share an operation above them.

The pass begins at all losses at once. Every operation above the features belongs to one task, and so does every gradient. Only
at the features would the engine add up the gradients of the tasks. So hooks on the operations that use a feature take these
gradients before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .gramian import HeadGradients
from .graph import edge
from .nodes import LeafNode, has_hooks
from .passes import LossOutputs, SampleOutputs, run_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .graph import Entrance
    from .partition import Partition
    from .passes import Outputs


def can_join(outputs: Outputs, partition: Partition) -> bool:
    """Return whether one pass down to the features keeps the gradients of all tasks apart.

    A hook on a feature must act on every task's gradient, so it rules the pass out, as does a head that two tasks reach.

    Args:
        outputs: The outputs at which the passes begin.
        partition: Leaves of the graph, with features.
    """
    graph = partition.upper_graph
    if not isinstance(outputs, LossOutputs) or isinstance(outputs, SampleOutputs):
        return False
    if not partition.features or not partition.is_disjoint:
        return False
    if any(entrance.user is None for entrance in graph.entrances):  # a loss that is itself a feature
        return False
    if any(z._backward_hooks or z.retains_grad or has_hooks(edge(z).node) for z in partition.features):
        return False
    if any(root is not None and edge(root).node not in graph.owners for root in outputs.roots):
        return False
    owners = [{graph.owners.get(user) for user, _ in users} for node, users in graph.users.items() if type(node) is LeafNode]
    return all(len(roots) == 1 and None not in roots for roots in owners)


def joint_pass(
    outputs: LossOutputs, partition: Partition, *, retain_graph: bool
) -> tuple[list[list[Tensor | None]], HeadGradients]:
    """Run one backward pass of all tasks down to the features.

    Args:
        outputs: The losses.
        partition: Leaves of a graph for which `can_join` is true.
        retain_graph: Retain the graph above the features.

    Returns:
        By task, the gradient of each feature, None where the task does not reach it; and the gradients of the heads.
    """
    graph, heads = partition.upper_graph, partition.heads
    # The graph numbers the losses of this rank only
    tasks = {graph.owners[edge(root).node]: k for k, root in enumerate(outputs.roots) if root is not None}
    places = {(end.node, end.output_nr): i for i, end in enumerate(map(edge, partition.features))}
    rows: list[list[Tensor | None]] = [[None] * len(places) for _ in range(outputs.num_tasks)]
    beginning = outputs.weighted_cotangents([1.0] * outputs.num_tasks)
    with ExitStack() as stack:
        for entrance in graph.entrances:
            hook = entrance.user.register_hook(_recorder(rows[tasks[entrance.root]], places[entrance.end], entrance))
            stack.callback(hook.remove)
        computed = run_backward(beginning, [*partition.features, *heads], retain_graph=retain_graph)
    by_task = HeadGradients([[] for _ in rows])
    leaves = [(node.variable, users[0][0]) for node, users in graph.users.items() if type(node) is LeafNode]
    owners = {id(leaf): tasks[graph.owners[user]] for leaf, user in leaves}
    for head, gradient in zip(heads, computed[len(places) :], strict=True):
        if gradient is not None:
            by_task.by_task[owners[id(head)]].append((head, gradient))
    return rows, by_task


def _recorder(row: list[Tensor | None], place: int, entrance: Entrance) -> Any:
    """Return a hook that adds the gradient that leaves a node by one of its inputs to the gradient of a feature."""

    def record(inputs: Sequence[Tensor | None], _: object) -> None:
        gradient, before = inputs[entrance.position], row[place]
        if gradient is not None:
            row[place] = gradient if before is None else before + gradient

    return record
