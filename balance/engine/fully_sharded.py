"""Task gradients of parameters that FSDP2 shards.

FSDP2 gathers parameters and reduces gradients by hooks that only an ordinary backward pass runs. So each task gets an ordinary
backward pass, after which every rank takes its shard of the reduced gradients. The Gramian is the sum of the Gramians of the
shards, and each rank combines its own shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import distributed

from ..distributed.sharding import from_shard, local_shard, may_be_sharded, shard_group, sharded_parameters
from .accumulate import cleared_grads
from .gramian import TaskRows
from .graph import trace
from .partition import Partition
from .task_gradients import TaskGradients

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from .accumulate import LeafGradient
    from .graph import Root
    from .passes import LossOutputs


def sharded_partition(roots: Sequence[Root | None], shared: Iterable[Tensor], excluded: Iterable[Tensor]) -> Partition | None:
    """Partition the sharded parameters that some losses reach.

    Args:
        roots: By task, its loss in the graph.
        shared: The shared parameters, sharded or gathered.
        excluded: Leaf tensors that are no heads.

    Returns:
        The partition, of sharded parameters; None if no parameter is sharded.

    Raises:
        RuntimeError: If only some parameters are sharded.
    """
    if not may_be_sharded():  # the usual case, which needs no walk through the graph
        return None
    graph = trace(roots)
    others = {id(tensor) for tensor in excluded}
    shared, reached = list(shared), [leaf for leaf in graph.leaves if leaf.requires_grad and id(leaf) not in others]
    sharded = sharded_parameters([*shared, *reached])
    if not sharded:
        return None
    if any(id(tensor) not in sharded for tensor in (*shared, *reached)):
        raise RuntimeError(
            "Either all parameters that the losses reach must be sharded or none, but only some are. Call fully_shard on the "
            "whole model too, after its parts."
        )
    trunk = {id(sharded[id(tensor)]): sharded[id(tensor)] for tensor in shared if sharded[id(tensor)].requires_grad}
    heads = {id(sharded[id(leaf)]): sharded[id(leaf)] for leaf in reached if id(sharded[id(leaf)]) not in trunk}
    return Partition("parameters", list(trunk.values()), list(trunk.values()), list(heads.values()), [], graph, graph)


def backward_into_shards(
    root: Root | None, gradient: Tensor | None, parameters: Sequence[Tensor], *, retain_graph: bool
) -> list[Tensor | None]:
    """Run one ordinary backward pass, and return this rank's shards of the reduced gradients, flat.

    Args:
        root: Loss at which the pass begins.
        gradient: Gradient with which it begins.
        parameters: Sharded parameters, whose ``.grad`` is None before and afterwards.
        retain_graph: Retain the graph after the pass.

    Returns:
        One shard for each parameter; None where the loss does not reach it.
    """
    if root is not None:
        torch.autograd.backward([root], [gradient], retain_graph=retain_graph)  # type: ignore[arg-type]
    shards = [None if parameter.grad is None else local_shard(parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return shards


@dataclass
class FullyShardedGradients(TaskGradients):
    """Gradients of K losses of the whole batch of all ranks, of which each rank has its shard.

    Attributes:
        group: The ranks that together have one copy of all parameters.
        head_squares: Squared lengths of the gradients of the heads. Shape (K,)
    """

    group: ProcessGroup | None = None
    head_squares: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def measure(
        cls,
        outputs: LossOutputs,
        partition: Partition,
        num_ranks: int,
        *,
        retain_graph: bool,
        roots: Sequence[Tensor] | None = None,
    ) -> FullyShardedGradients:
        """Compute the gradients of all tasks.

        Args:
            outputs: The losses; every rank must have all of them.
            partition: Sharded parameters.
            num_ranks: Number of ranks over which FSDP2 averages gradients.
            retain_graph: Retain the graph after the passes.
            roots: For each parameter of the trunk, factors on its coordinates for the inner products; None: 1.

        Returns:
            The gradients.
        """
        K, parameters = outputs.num_tasks, [*partition.trunk, *partition.heads]
        gradients = cls(outputs, partition, [[False] * K for _ in partition.trunk], group=shard_group(parameters))
        rows = TaskRows(K, [[] for _ in partition.trunk])
        with cleared_grads(parameters):
            for k in range(K):
                (root,), (begin,) = outputs.task_cotangents(k)
                shards = backward_into_shards(root, begin * num_ranks, parameters, retain_graph=retain_graph or k < K - 1)
                for position, by_task in enumerate(rows.by_tensor):
                    by_task.append(shards[position])
                    gradients.reached_by[position][k] = shards[position] is not None
                gradients.heads.add(k, partition.heads, shards[len(partition.trunk) :])
        gradients.rows = rows
        gradients.gramian = rows.gramian(outputs.device, None if roots is None else [local_shard(root) for root in roots])
        gradients._sum()
        return gradients

    def _sum(self) -> None:
        K = len(self.gramian)
        sums = torch.cat([self.gramian.flatten(), super().head_lengths().square()])
        distributed.all_reduce(sums, group=self.group)
        self.gramian, self.head_squares = sums[: K * K].view(K, K), sums[K * K :]

    @property
    def needs_pass(self) -> bool:
        """Return whether a weighted sum costs a further backward pass."""
        return False

    def head_lengths(self) -> Tensor:
        """Return the length of each task's gradients of the heads. Shape (K,), float64."""
        return self.head_squares.sqrt()

    def heads_are_finite(self, task: int) -> bool:
        """Return whether all entries of a task's gradients of the heads are finite on all ranks."""
        num_bad = torch.tensor(float(not super().heads_are_finite(task)), dtype=torch.float64, device=self.gramian.device)
        distributed.all_reduce(num_bad, group=self.group)
        return not num_bad

    def head_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head. ``weights``: length K."""
        return [(head, from_shard(shard, head)) for head, shard in super().head_sums(weights)]

    def weighted_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of the trunk; see `TaskGradients.weighted_sums`."""
        assert self.rows is not None
        sums = zip(self.partition.trunk, self.rows.weighted_sums(weights), strict=True)
        return [(parameter, from_shard(shard, parameter)) for parameter, shard in sums if shard is not None]

    def trunk_length(self, weights: Sequence[float]) -> float:
        """Return the length of a weighted sum of the tasks' gradients of the trunk, with the factor of mixed precision."""
        square = torch.tensor(super().trunk_length(weights) ** 2, dtype=torch.float64, device=self.gramian.device)
        distributed.all_reduce(square, group=self.group)
        return math.sqrt(float(square))
