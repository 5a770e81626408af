"""Gradients of K tasks, summed over the micro-batches of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .accumulate import gradient_sum
from .gramian import HeadGradients, TaskRows, to_vector
from .graph import Trace
from .layers import MeasuredTensor
from .over_ranks import GlobalGradients, Layout, ShardedRows
from .partition import Partition
from .passes import LossOutputs
from .task_gradients import TaskGradients, common_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..types import Gramian
    from .accumulate import LeafGradient

_EMPTY = Trace([], {}, disjoint=True, functions=[], entrances=[], owners={})


class CollectedRows:
    """Sums of the gradients of each task, by leaf tensor, weighted by numbers of samples.

    Args:
        num_tasks: Number of all tasks.

    Attributes:
        products: Sums of the inner products of the gradients of features, if conflict is measured on features. Shape
            (tasks, tasks), float64.
    """

    def __init__(self, num_tasks: int) -> None:
        self._by_task: list[dict[int, LeafGradient]] = [{} for _ in range(num_tasks)]
        self.products: Gramian | None = None

    def add(self, task: int, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], count: float) -> None:
        """Add the gradients of one micro-batch.

        Args:
            task: Index of the task among all tasks.
            leaves: Leaf tensors.
            gradients: Gradients of a mean loss, one for each leaf; None where the task does not reach the leaf.
            count: Number of samples of that mean.
        """
        sums = self._by_task[task]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            before = sums.get(id(leaf))
            if before is None:
                sums[id(leaf)] = (leaf, wide * count)
            elif wide.is_sparse or before[1].is_sparse:
                sums[id(leaf)] = (leaf, gradient_sum(before[1], wide * count))
            else:
                before[1].add_(wide, alpha=count)

    def add_products(self, gramian: Gramian, tasks: Sequence[int], counts: Sequence[float]) -> None:
        """Add the inner products of the gradients of features of one micro-batch, whose samples are further coordinates.

        Args:
            gramian: Shape (k, k).
            tasks: Indices of its tasks among all tasks. Length k.
            counts: Numbers of samples. Length k.
        """
        if self.products is None:
            self.products = torch.zeros(len(self._by_task), len(self._by_task), dtype=torch.float64, device=gramian.device)
        n = gramian.new_tensor(counts)
        indices = torch.tensor(tasks, device=gramian.device)
        self.products[indices[:, None], indices] += (n[:, None] * gramian * n).to(self.products.device)

    def leaves(self) -> list[Tensor]:
        """Return all leaf tensors that have a gradient."""
        return [leaf for leaf, _ in {key: pair for sums in self._by_task for key, pair in sums.items()}.values()]

    def divide(self, tasks: Sequence[int], counts: Sequence[float]) -> None:
        """Divide the sums of tasks by numbers of samples.

        Args:
            tasks: Indices among all tasks.
            counts: One number for each of ``tasks``.
        """
        inverse = torch.ones(len(self._by_task), dtype=torch.float64, device="cpu")
        for task, count in zip(tasks, counts, strict=True):
            inverse[task] = 1 / count
            for _, gradient in self._by_task[task].values():
                gradient.mul_(1 / count)
        if self.products is not None:
            scale = inverse.to(self.products.device)
            self.products *= scale[:, None] * scale

    def gradients(
        self,
        partition: Partition,
        tasks: Sequence[int],
        unit: Tensor,
        ranks: Ranks,
        *,
        as_matrix: bool,
        roots: Sequence[Tensor] | None = None,
    ) -> TaskGradients:
        """Return the gradients in the form of one step; the sums are emptied.

        Args:
            partition: Leaves, as `collected_partition` returns them.
            tasks: Indices of the present tasks among all tasks. Length K.
            unit: Gradient with which the passes have begun. Shape ().
            ranks: The ranks over which the gradients are summed.
            as_matrix: Return the Jacobian as one matrix (K, P).
            roots: For each parameter of the trunk, factors on its coordinates for the inner products; None: 1.

        Returns:
            Gradients of the mean losses.
        """
        K = len(tasks)
        sums = [self._by_task[task] for task in tasks]
        rows = TaskRows(K, [[_taken(by_leaf, leaf) for by_leaf in sums] for leaf in partition.trunk])
        gradients = TaskGradients(LossOutputs([None] * K, unit), partition, [[False] * K for _ in partition.trunk])
        gradients.heads = HeadGradients([list(by_leaf.values()) for by_leaf in sums])
        tensors = [MeasuredTensor(i, leaf, root=None if roots is None else roots[i]) for i, leaf in enumerate(partition.trunk)]
        gradients.note_reached(tensors, rows)
        for k in range(K):
            gradients.note_sparse(tensors, [by_task[k] for by_task in rows.by_tensor])
        indices = torch.tensor(tasks, dtype=torch.int64, device="cpu")
        products = None if self.products is None else self.products[indices][:, indices]
        if as_matrix:
            _store_matrix(gradients, rows)
        if ranks.size == 1:
            return _with_rows(gradients, tensors, rows, products)
        return _over_ranks(gradients, rows, products, ranks, roots)


def collected_partition(trunk: list[Tensor], heads: list[Tensor]) -> Partition:
    """Return a partition without a graph, given shared parameters and heads."""
    return Partition("parameters", trunk, trunk, heads, [], _EMPTY, _EMPTY)


def _taken(by_leaf: dict[int, LeafGradient], leaf: Tensor) -> Tensor | None:
    pair = by_leaf.pop(id(leaf), None)
    if pair is None:
        return None
    return pair[1] if pair[1].is_sparse else to_vector(pair[1])


def _store_matrix(gradients: TaskGradients, rows: TaskRows) -> None:
    trunk = gradients.partition.trunk
    gradients.allocate_jacobian(trunk[0].device if trunk else torch.device("cpu"))
    assert gradients.jacobian is not None
    for k in range(rows.num_tasks):
        Layout.of(trunk).fill(gradients.jacobian[k], [by_task[k] for by_task in rows.by_tensor])


def _with_rows(
    gradients: TaskGradients, tensors: Sequence[MeasuredTensor], rows: TaskRows, products: Gramian | None
) -> TaskGradients:
    """Return gradients with rows, and their Gramian if it is not given."""
    gradients.tensors, gradients.rows = common_indices(tensors, rows), rows
    device = tensors[0].tensor.device if tensors else gradients.outputs.device
    if products is None:
        measured = [
            list(tensor.coordinates(by_task)) for tensor, by_task in zip(gradients.tensors, rows.by_tensor, strict=True)
        ]
        products = TaskRows(rows.num_tasks, measured).gramian(device)
    gradients.gramian = products
    return gradients


def _over_ranks(
    gradients: TaskGradients, rows: TaskRows, products: Gramian | None, ranks: Ranks, roots: Sequence[Tensor] | None
) -> GlobalGradients:
    """Return gradients that are summed over ranks."""
    if gradients.jacobian is not None:
        return GlobalGradients.of(gradients, ranks)
    sharded = ShardedRows(rows.num_tasks, gradients.partition.trunk, ranks, roots)
    for k in range(rows.num_tasks):
        sharded.begin(k, [by_task[k] for by_task in rows.by_tensor])
        for by_task in rows.by_tensor:
            by_task[k] = None
    sharded.finish()
    gradients.gramian = sharded.gramian() if products is None else products
    return GlobalGradients.of(gradients, ranks, sharded)
