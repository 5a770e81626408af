"""Task gradients of one step over several ranks: every rank adds its samples, and all get the gradients of the whole batch.

Rows are summed while the next backward pass runs, and each rank keeps a shard of every row (reduce-scatter). The Gramian is
the sum of the Gramians of the shards. The direction is gathered from the shards.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..distributed.ranks import Ranks
from .accumulate import leaf_gradients, without_hooks
from .gramian import InnerProducts, from_vector, gramian_of, to_vector
from .passes import weighted_pass
from .task_gradients import TaskGradients, length

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..types import Direction, Gramian, Jacobian
    from .accumulate import LeafGradient
    from .layers import MeasuredTensor


class Layout(NamedTuple):
    """Flat gradients of some tensors, next to each other.

    Attributes:
        sizes: Numbers of each tensor, complex ones counted twice.
        dtype: The widest dtype of the tensors, at least float32.
        device: Device of the first tensor.
    """

    sizes: list[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """Return the layout of the gradients of some tensors."""
        sizes = [tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors]
        dtypes = [tensor.real.dtype if tensor.is_complex() else tensor.dtype for tensor in tensors]
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        return cls(sizes, dtype, tensors[0].device if tensors else torch.device("cpu"))

    def fill(self, row: Tensor, gradients: Iterable[Tensor | None]) -> None:
        """Copy gradients to their places in a row of zeros. Shape (at least the sum of the sizes,)."""
        places = torch.split(row[: sum(self.sizes)], self.sizes)
        for place, gradient in zip(places, gradients, strict=False):
            if gradient is not None:
                place.copy_(to_vector(gradient))

    def split(self, row: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the pieces of a row in the shapes of the tensors."""
        pieces = torch.split(row[: sum(self.sizes)], self.sizes)
        return [from_vector(piece, tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


class Reached:
    """Facts about gradients that ranks must agree on: whether a tensor has one, and whether it is sparse.

    Args:
        facts: By tensor: whether it has a gradient, whether that is dense, and its sparse dimensions. Shape (tensors, 3).
    """

    def __init__(self, facts: Tensor) -> None:
        self.facts = facts

    @classmethod
    def of(cls, gradients: Sequence[Tensor | None]) -> Reached:
        """Return the facts about gradients on this rank."""
        rows = [[0, 0, 0] if g is None else [1, 0, g.sparse_dim()] if g.is_sparse else [1, 1, 0] for g in gradients]
        return cls(torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, 3))

    def applied(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return summed gradients: None where no rank has one, sparse where all are sparse."""
        results: list[Tensor | None] = []
        for gradient, (count, dense, dims) in zip(gradients, self.facts.tolist(), strict=True):
            if not count:
                results.append(None)
            else:
                results.append(gradient if dense else gradient.to_sparse(round(dims / count)))
        return results


def sum_gradients(ranks: Ranks, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sum gradients over ranks.

    Args:
        ranks: The ranks, all of which must make this call.
        tensors: Their tensors, in an order that is equal on all ranks.
        gradients: Gradients on this rank, None where there is none.

    Returns:
        The sums; None where no rank has a gradient.
    """
    if not tensors:
        return []
    layout = Layout.of(tensors)
    length = sum(layout.sizes)
    buffer = torch.zeros(length + 3 * len(tensors), dtype=layout.dtype, device=layout.device)
    layout.fill(buffer, gradients)
    buffer[length:] = Reached.of(gradients).facts.flatten().to(buffer)
    buffer = ranks.sum(buffer)
    return Reached(buffer[length:].view(-1, 3)).applied(layout.split(buffer, tensors))


class ShardedRows:
    """Gradients of K tasks, summed over ranks; each rank keeps a shard of every row.

    Args:
        num_tasks: Number of tasks, K.
        tensors: The tensors of the gradients, in an order that is equal on all ranks.
        ranks: The ranks.
        roots: For each tensor, factors on its coordinates for the inner products; None: 1.
    """

    def __init__(
        self, num_tasks: int, tensors: Sequence[Tensor], ranks: Ranks, roots: Sequence[Tensor | None] | None = None
    ) -> None:
        self._ranks, self._tensors, self._layout, self._roots = ranks, tensors, Layout.of(tensors), roots
        self._length = sum(self._layout.sizes) + -sum(self._layout.sizes) % ranks.size
        self.shards = torch.zeros(  # (K, P / ranks)
            num_tasks, self._length // ranks.size, dtype=self._layout.dtype, device=self._layout.device
        )
        self._pending: list[tuple[Any, Tensor]] = []

    def begin(self, task: int, gradients: Iterable[Tensor | None]) -> None:
        """Begin to sum one task's gradients over ranks. All ranks must add the same tasks in the same order.

        Args:
            task: Index of the task.
            gradients: One for each tensor, further ones are ignored; None is zero.
        """
        if not self._tensors:
            return
        row = torch.zeros(self._length, dtype=self._layout.dtype, device=self._layout.device)
        self._layout.fill(row, gradients)
        if len(self._pending) > 1:  # one row is on its way while the next pass runs
            self._pending.pop(0)[0].wait()
        work = self._ranks.reduce_scatter(self.shards[task], row)
        self._pending.append((work, row))

    def finish(self) -> None:
        """Wait for all sums."""
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()

    def gramian(self) -> Gramian:
        """Return the inner products of this rank's shards. Shape (K, K), float64."""
        products = InnerProducts(len(self.shards), max(self.shards.shape[1], 1), self.shards.device)
        factors = self._shard_of_roots()
        products.add([row if factors is None else row * factors for row in self.shards.unbind()])
        return products.total()

    def _shard_of_roots(self) -> Tensor | None:
        """Return the factors on the coordinates of this rank's shard. Shape (P / ranks,)."""
        if self._roots is None or all(root is None for root in self._roots):
            return None
        row = torch.zeros(self._length, dtype=self._layout.dtype, device=self._layout.device)
        self._layout.fill(row, self._roots)
        width = self.shards.shape[1]
        return row[self._ranks.rank * width : (self._ranks.rank + 1) * width]

    def weighted_sum(self, weights: Sequence[float]) -> list[Tensor]:
        """Return the weighted sum of the tasks' gradients of each tensor, gathered from all ranks.

        Args:
            weights: One for each task. Length K.
        """
        if not self._tensors:
            return []
        total = torch.empty(self._length, dtype=self._layout.dtype, device=self._layout.device)
        self._ranks.all_gather(total, self._shard_sum(weights))
        return self._layout.split(total, self._tensors)

    def square(self, weights: Sequence[float]) -> Tensor:
        """Return this rank's part of the squared length of a weighted sum. Shape (), float64."""
        length: Tensor = torch.linalg.vector_norm(self._shard_sum(weights), dtype=torch.float64)
        return length.square()

    def _shard_sum(self, weights: Sequence[float]) -> Tensor:
        return self.shards.new_tensor(weights) @ self.shards


def sum_passes(
    passes: Iterable[Sequence[Tensor | None]],
    gradients: TaskGradients,
    tensors: Sequence[MeasuredTensor],
    heads: Sequence[Tensor],
    ranks: Ranks,
) -> ShardedRows:
    """Run backward passes, and sum the gradients of each over ranks while the next one runs.

    Args:
        passes: By task, its gradients of the tensors and heads; computed on demand.
        gradients: The gradients of this rank, which get the gradients of the heads and the flags of reached tensors.
        tensors: Tensors whose gradients are summed.
        heads: Task-specific parameters, whose gradients stay on this rank.
        ranks: The ranks.

    Returns:
        The summed gradients of the tensors.
    """
    roots = [tensor.root for tensor in tensors]
    sharded = ShardedRows(gradients.outputs.num_tasks, [tensor.tensor for tensor in tensors], ranks, roots)
    for task, computed in enumerate(passes):
        sharded.begin(task, computed)
        gradients.heads.add(task, heads, computed[len(tensors) :])
        gradients.note_sparse(tensors, computed)
        for tensor, gradient in zip(tensors, computed, strict=False):
            gradients.reached_by[tensor.position][task] = gradient is not None
    sharded.finish()
    return sharded


@dataclass
class GlobalGradients(TaskGradients):
    """Gradients of K losses of the whole batch of all ranks. Every method is a collective.

    Attributes:
        ranks: The ranks.
        sharded: The gradients of the trunk, if they are stored.
        head_squares: Sums over ranks of the squared lengths of the gradients of the heads. Shape (K,)
        reached: Facts about the gradients of ``partition.inputs``.
    """

    ranks: Ranks = field(default_factory=Ranks)
    sharded: ShardedRows | None = None
    head_squares: Tensor = field(default_factory=lambda: torch.empty(0))
    reached: Reached = field(default_factory=lambda: Reached.of([]))

    @classmethod
    def of(cls, local: TaskGradients, ranks: Ranks, sharded: ShardedRows | None = None) -> GlobalGradients:
        """Return gradients with the Gramian, the lengths and the reached tensors of all ranks.

        Args:
            local: The gradients of this rank, with the Gramian of its shards or features.
            ranks: The ranks.
            sharded: The gradients of the trunk, if they are stored.
        """
        gradients = cls(**vars(local), ranks=ranks, sharded=sharded)
        if gradients.jacobian is not None:
            gradients.jacobian = ranks.sum(gradients.jacobian)
            gradients.gramian = _gramian_of_columns(gradients.jacobian, ranks)
        gradients._sum_facts()
        return gradients

    def _sum_facts(self) -> None:
        """Sum everything that is decided on over ranks, in one all-reduce."""
        K, device = self.outputs.num_tasks, self.gramian.device
        squares = super().head_lengths().square()
        reached_by = torch.tensor(self.reached_by, dtype=torch.float64, device=device).view(-1, K)
        facts = torch.zeros(len(reached_by), 3, dtype=torch.float64, device=device)
        for position, dims in self.sparse_dims.items():
            facts[position] = facts.new_tensor([1, dims == 0, dims])
        parts = [self.gramian, squares, reached_by, facts]
        sums = self.ranks.sum(torch.cat([part.flatten() for part in parts]))
        pieces = torch.split(sums, [part.numel() for part in parts])
        self.gramian, self.head_squares, reached_by, facts = (
            piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)
        )
        self.reached_by = (reached_by > 0).tolist()
        self.reached = Reached(facts.cpu())

    @property
    def needs_pass(self) -> bool:
        """Return whether a weighted sum costs a further backward pass."""
        return self.sharded is None

    def head_lengths(self) -> Tensor:
        """Return a bound on the length of each task's gradients of the heads. Shape (K,), float64."""
        return (self.ranks.size * self.head_squares).sqrt()  # of a sum of vectors, by the lengths of its terms

    def heads_are_finite(self, task: int) -> bool:
        """Return whether all entries of a task's gradients of the heads are finite on all ranks."""
        num_bad = torch.tensor(float(not super().heads_are_finite(task)), dtype=torch.float64, device="cpu")
        return not self.ranks.sum(num_bad)

    def head_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of each head. ``weights``: length K."""
        return self._summed(self.partition.heads, super().head_sums(weights))

    def weighted_sums(self, weights: Sequence[float]) -> list[LeafGradient]:
        """Return the weighted sum of the tasks' gradients of the trunk; see `TaskGradients.weighted_sums`."""
        if self.sharded is None:
            return self._summed(self.partition.trunk, super().weighted_sums(weights))
        sums = self.reached.applied(self.sharded.weighted_sum(weights))
        return leaf_gradients(self.partition.trunk, sums)

    def trunk_length(self, weights: Sequence[float]) -> float:
        """Return the length of a weighted sum of the tasks' gradients of the trunk, with the factor of mixed precision."""
        if self.sharded is not None:
            return float(self.ranks.sum(self.sharded.square(weights)).sqrt())
        trunk = self.partition.trunk
        with without_hooks(trunk):
            local = weighted_pass(self.outputs, weights, trunk, retain_graph=True)
        return length(gradient for gradient in sum_gradients(self.ranks, trunk, local) if gradient is not None)

    def split(self, direction: Direction) -> list[Tensor | None]:
        """Split a direction into pieces for ``partition.inputs``; see `TaskGradients.split`. Shape (P,)."""
        inputs = self.partition.inputs
        pieces = torch.split(direction, [tensor.numel() for tensor in inputs])
        return self.reached.applied([piece.view(tensor.shape) for piece, tensor in zip(pieces, inputs, strict=True)])

    def _summed(self, leaves: Sequence[Tensor], pairs: Sequence[LeafGradient]) -> list[LeafGradient]:
        by_leaf = {id(leaf): gradient for leaf, gradient in pairs}
        return leaf_gradients(leaves, sum_gradients(self.ranks, leaves, [by_leaf.get(id(leaf)) for leaf in leaves]))


def _gramian_of_columns(jacobian: Jacobian, ranks: Ranks) -> Gramian:
    """Return the part of a Gramian that belongs to this rank's columns. Shape (K, K), float64."""
    width = math.ceil(jacobian.shape[1] / ranks.size)
    columns = jacobian[:, ranks.rank * width : (ranks.rank + 1) * width]
    return gramian_of(columns)
