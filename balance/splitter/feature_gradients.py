"""Task gradients of the features of one backward pass, and sums of their lengths and inner products over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..distributed.ranks import Ranks
    from ..engine.gramian import TaskRows
    from ..types import Gramian, Jacobian


class FeatureGradients(NamedTuple):
    """Gradients of the feature tensors, of the k tasks that reach any of them."""

    rows: TaskRows
    tasks: list[int]  # indices of the k tasks among all tasks
    indices: Tensor  # the same indices, on the device of the first tensor. Shape (k,)
    lengths: list[int]  # numbers of entries of the feature tensors
    batch: int  # number of samples

    def combined(self, weights: Tensor) -> list[Tensor | None]:
        """Return the weighted sum of the tasks' gradients of each tensor, flat; None for an unreached tensor.

        Args:
            weights: Shape (k,).
        """
        return list(self.rows.weighted_sums(weights))

    def samples(self) -> list[Tensor]:
        """Return the gradients of every sample, for each tensor, at least float32. Shape (B, k, f) each."""
        return [J.view(len(J), self.batch, J.shape[1] // max(self.batch, 1)).transpose(0, 1) for J in self._matrices()]

    def jacobian(self) -> Jacobian:
        """Return the gradients as rows, on one device, in the widest dtype, at least float32. Shape (k, F)."""
        matrices = self._matrices()
        dtype = torch.float32
        for J in matrices:
            dtype = torch.promote_types(dtype, J.dtype)
        return torch.cat([J.to(self.indices.device, dtype) for J in matrices], dim=1)

    def _matrices(self) -> list[Tensor]:
        """Return the gradients of each tensor as a matrix, zero where a task does not reach the tensor. Shape (k, f) each."""
        return [
            _matrix(by_task, length, self.indices.device)
            for by_task, length in zip(self.rows.by_tensor, self.lengths, strict=True)
        ]


class Sums(NamedTuple):
    """Sums over all ranks; zero where a task is absent."""

    squares: Tensor  # squared lengths. Shape (K,)
    gramian: Gramian | None  # (K, K)
    finite: Tensor  # whether all of them are finite
    tasks: list[int]  # indices of the tasks that are present on any rank
    batch: float  # number of samples


def sum_over_ranks(squares: Tensor, gramian: Gramian | None, gradients: FeatureGradients, num_tasks: int, ranks: Ranks) -> Sums:
    """Sum squared lengths and Gramians over the ranks, for the gradients of the mean of the ranks' losses.

    Args:
        squares: Squared lengths of the gradients of this rank. Shape (k,).
        gramian: Their inner products, shape (k, k), or None.
        gradients: The gradients of this rank.
        num_tasks: Number of tasks, K.
        ranks: The processes that train together.

    Returns:
        The sums, padded with zeros for absent tasks.
    """
    q, G = _padded(squares, gramian, gradients.indices, num_tasks)
    tasks: Sequence[int] = gradients.tasks
    samples, size = float(gradients.batch), ranks.size
    if size > 1:
        present = q.new_zeros(num_tasks)
        present[gradients.indices] = 1
        parts = [present, q.new_tensor([samples]), q / size**2, *([] if G is None else [G.flatten() / size**2])]
        sums = ranks.sum(torch.cat(parts))
        *counts, samples = sums[: num_tasks + 1].tolist()
        tasks = [k for k, count in enumerate(counts) if count]
        q = sums[num_tasks + 1 : 2 * num_tasks + 1]
        G = None if G is None else sums[2 * num_tasks + 1 :].view(num_tasks, num_tasks)
    return Sums(q, G, (q if G is None else G).isfinite().all() & q.isfinite().all(), list(tasks), samples)


def _padded(squares: Tensor, gramian: Gramian | None, index: Tensor, num_tasks: int) -> tuple[Tensor, Gramian | None]:
    if len(index) == num_tasks:
        return squares, gramian
    q = squares.new_zeros(num_tasks)
    q[index] = squares
    if gramian is None:
        return q, None
    G = gramian.new_zeros(num_tasks, num_tasks)
    G[index[:, None], index] = gramian
    return q, G


def _matrix(by_task: Sequence[Tensor | None], length: int, device: torch.device) -> Tensor:
    first = next((row for row in by_task if row is not None), None)
    if first is None:
        return torch.zeros(len(by_task), length, dtype=torch.float32, device=device)
    J = torch.stack([torch.zeros_like(first) if row is None else row for row in by_task])
    return J.to(torch.promote_types(J.dtype, torch.float32))
