"""Task gradients of the features that meet in a `Splitter`, and their sums over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from balance.engine.gramian import InnerProducts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from balance.types import Gramian, Jacobian


class FeatureGradients(NamedTuple):
    """Gradients of the feature tensors, of the k tasks that reach them."""

    flat: list[list[Tensor]]  # [tensor][task], each flat; zero where the task does not reach the tensor
    tasks: list[int]  # indices of the k tasks
    indices: Tensor  # the same indices, on the device of the first tensor
    batch: int  # number of samples

    def squares(self) -> Tensor:
        """Return the squared lengths, float64. Shape (k,)."""
        total = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.indices.device)
        for rows in self.flat:
            norms = [torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]
            total += torch.stack(norms).square().to(total) if norms else total
        return total

    def gramian(self) -> Gramian:
        """Return the inner products, float64. Shape (k, k)."""
        if not self.tasks:
            return torch.zeros(0, 0, dtype=torch.float64, device=self.indices.device)
        products = InnerProducts(len(self.tasks), sum(len(first) for first, *_ in self.flat), self.indices.device)
        for rows in self.flat:
            products.add(rows)
        return products.total()

    def combined(self, weights: Tensor) -> list[Tensor]:
        """Return the weighted sum of the tasks' gradients of each tensor, flat, at least float32. ``weights``: shape (k,)."""
        sums = []
        for rows in self.flat:
            dtype = torch.promote_types(rows[0].dtype, torch.float32) if rows else torch.float32
            factors = weights.to(rows[0].device if rows else weights.device, dtype).unbind()
            total = rows[0].to(dtype) * factors[0] if rows else weights
            for row, factor in zip(rows[1:], factors[1:], strict=True):
                total.addcmul_(row.to(dtype), factor)
            sums.append(total)
        return sums

    def samples(self) -> list[Tensor]:
        """Return the gradients of every sample, for each tensor, at least float32. Shape (B, k, f) each."""
        pieces = []
        for rows in self.flat:
            J = torch.stack(rows)
            J = J.to(torch.promote_types(J.dtype, torch.float32))
            pieces.append(J.view(len(rows), self.batch, J.shape[1] // max(self.batch, 1)).transpose(0, 1))
        return pieces

    def jacobian(self) -> Jacobian:
        """Return the gradients as rows, on one device, in the widest dtype, at least float32. Shape (k, F)."""
        dtype = torch.float32
        for rows in self.flat:
            dtype = torch.promote_types(dtype, rows[0].dtype)
        return torch.cat([torch.stack(rows).to(self.indices.device, dtype) for rows in self.flat], dim=1)


class Sums(NamedTuple):
    """Sums over all ranks; zero where a task is absent."""

    squares: Tensor  # squared lengths. Shape (K,)
    gramian: Gramian | None  # (K, K)
    finite: Tensor  # whether all of them are finite
    tasks: list[int]  # indices of the tasks that are present on any rank
    batch: float


def flat_gradient(gradient: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a gradient as a vector; zeros without memory for None."""
    if gradient is None:
        return torch.zeros((), dtype=dtype, device=device).expand(shape.numel())
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def sum_over_ranks(squares: Tensor, gramian: Gramian | None, gradients: FeatureGradients, num_tasks: int) -> Sums:
    """Sum squared lengths and Gramians over the ranks, as those of the gradients of the mean of the ranks' losses.

    Args:
        squares: Shape (k,).
        gramian: Shape (k, k), or None.
        gradients: Gradients of this rank.
        num_tasks: K.
    """
    q, G = _padded(squares, gramian, gradients.indices, num_tasks)
    tasks: Sequence[int] = gradients.tasks
    batch, ranks = float(gradients.batch), num_ranks()
    if ranks > 1:
        present = q.new_zeros(num_tasks)
        present[gradients.indices] = 1
        parts = [present, q.new_tensor([batch]), q / ranks**2, *([] if G is None else [G.flatten() / ranks**2])]
        sums = torch.cat(parts)
        torch.distributed.all_reduce(sums)
        *counts, batch = sums[: num_tasks + 1].tolist()
        tasks = [k for k, count in enumerate(counts) if count]
        q = sums[num_tasks + 1 : 2 * num_tasks + 1]
        G = None if G is None else sums[2 * num_tasks + 1 :].view(num_tasks, num_tasks)
    return Sums(q, G, (q if G is None else G).isfinite().all() & q.isfinite().all(), list(tasks), batch)


def num_ranks() -> int:
    """Return the number of processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


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
