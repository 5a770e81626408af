"""All tasks' backward passes in one batch: whether it is faster than one after the other, and whether torch can do it."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..messages import warn_caller
from .graph import Reachability, activation_count, unpacks_saved_tensors
from .nodes import LeafNode
from .passes import FeatureOutputs, LossOutputs, batched_passes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ..types import EngineChoice
    from .gramian import TaskRows
    from .graph import Root
    from .partition import Partition
    from .passes import Outputs


# On a CPU one batched operation costs as much as this many single ones, as measured on small networks of three kinds
_MANY = 8
_SMALL = 1 << 14  # numbers that an operation computes for one task; the batch of larger results leaves the cache


class Stacks(NamedTuple):
    """Gradients of K tasks that one batched pass has computed.

    Attributes:
        by_target: For each target the gradients of all tasks, of shape (K, ...); None where no task reaches it.
        reached_by: For each target and each task, whether the task reaches it; the gradients of the others are zero.
    """

    by_target: Sequence[Tensor | None]
    reached_by: list[list[bool]]

    def rows(self) -> list[tuple[Tensor | None, ...]]:
        """Return by task its gradients of the targets, None where it does not reach one."""
        by_target = [
            [None] * len(reached) if stack is None else _without_zeros(stack.unbind(), reached)
            for stack, reached in zip(self.by_target, self.reached_by, strict=True)
        ]
        return list(zip(*by_target, strict=True))


class Batching:
    """Choice of the form of the passes, and record of the operations that can be batched.

    Args:
        choice: Form of the K passes: one after the other, in one batch, or chosen automatically.

    Attributes:
        last: The form that was chosen last; None: no passes have run.
    """

    def __init__(self, choice: EngineChoice) -> None:
        self.choice = choice
        self.last: Literal["loop", "batched"] | None = None
        self._has_failed = False  # because of an operation
        self._known: set[frozenset[type]] = set()  # kinds of nodes of graphs that have been batched

    @property
    def can_run(self) -> bool:
        """Return whether no pass has failed because of an operation."""
        return not self._has_failed

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Suppress torch's notice that it runs an operation of a batch K times, unless the user has chosen the batch."""
        with warnings.catch_warnings():
            if self.choice == "auto":
                warnings.filterwarnings("ignore", message="There is a performance drop")
            yield

    def is_chosen(self, outputs: Outputs, partition: Partition) -> bool:
        """Return whether all tasks run through the trunk in one pass: as chosen, or where that is faster."""
        is_batched = self._is_batched(outputs, partition)
        self.last = "batched" if is_batched else "loop"
        return is_batched

    def _is_batched(self, outputs: Outputs, partition: Partition) -> bool:
        if self._has_failed or self.choice == "loop":
            return False
        if self.choice == "batched":
            return True
        if not partition.features or partition.functions:
            return False
        if outputs.device.type != "cpu":
            return activation_count(partition.lower_graph) <= sum(p.numel() for p in partition.trunk)
        if outputs.num_tasks < _MANY:
            return False
        count = sum(type(node) is not LeafNode for node in partition.lower_graph.users)
        return activation_count(partition.lower_graph) <= _SMALL * count and not unpacks_saved_tensors(partition.lower_graph)

    def stacks(self, outputs: Outputs, partition: Partition, targets: Sequence[Root], *, retain_graph: bool) -> Stacks | None:
        """Run the passes in one batch.

        Args:
            outputs: The outputs at which they begin.
            partition: Leaves of the graph.
            targets: Tensors or edges to differentiate with respect to.
            retain_graph: Retain the graph after the passes.

        Returns:
            The gradients; None, with a warning, if an operation cannot be batched.

        Raises:
            RuntimeError: If the graph may have been freed in part, so that no other passes can follow.
        """
        kinds = frozenset(map(type, (*partition.upper_graph.users, *partition.lower_graph.users)))
        is_known = kinds in self._known
        try:
            with self._quiet():
                # A graph of unknown operations is retained, so that sequential passes can follow if one cannot be batched
                gradients = batched_passes(outputs, targets, retain_graph=retain_graph or not is_known)
        except RuntimeError as error:
            if is_known and not retain_graph:
                raise RuntimeError(
                    f"The backward passes of the tasks cannot be batched at this step, but could before: {error} "
                    "Use engine='loop'."
                ) from error
            self._has_failed = True
            message = f"The backward passes of the tasks cannot be batched and run one after the other: {error}".splitlines()[0]
            warn_caller(f"{message} Use engine='loop'.")
            return None
        self._known.add(kinds)
        return Stacks(gradients, _reached_by(gradients, outputs, partition, targets))


def _reached_by(
    stacks: Sequence[Tensor | None], outputs: Outputs, partition: Partition, targets: Sequence[Root]
) -> list[list[bool]]:
    """Return for each target and each task whether the task reaches it."""
    if isinstance(outputs, FeatureOutputs) and len(outputs.features) == 1:  # then a target is reached by all its tasks
        tasks = [row is not None for row in outputs.rows.by_tensor[0]]
        return [tasks if stack is not None else [False] * len(tasks) for stack in stacks]
    return _tasks_reaching(outputs, partition, targets)


def _tasks_reaching(outputs: Outputs, partition: Partition, targets: Sequence[Root]) -> list[list[bool]]:
    """Return for each target and each task whether the task reaches it."""
    if isinstance(outputs, LossOutputs):
        paths = Reachability(partition.upper_graph, outputs.roots)
        return [paths.roots_reaching(target) for target in targets]
    paths = Reachability(partition.lower_graph, outputs.features)
    return [_tasks_through(paths.roots_reaching(target), outputs.rows) for target in targets]


def _tasks_through(is_above: Sequence[bool], rows: TaskRows) -> list[bool]:
    """Return for each task whether it reaches any of the features above a target."""
    above = [by_task for selected, by_task in zip(is_above, rows.by_tensor, strict=True) if selected]
    return [any(by_task[k] is not None for by_task in above) for k in range(rows.num_tasks)]


def _without_zeros(gradients: Sequence[Tensor], is_reached: Sequence[bool]) -> Sequence[Tensor | None]:
    """Replace the zeros that a batched pass returns for a tensor that only other tasks reach by None."""
    return [gradient if reached else None for gradient, reached in zip(gradients, is_reached, strict=True)]
