"""Clusters of numbers by one-dimensional k-means: GO4Align's grouping."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


FEW = 12  # on the host, loops in Python are faster than operations of torch for up to so many points


def k_means_1d(points: Tensor, num_clusters: int) -> Tensor:
    """Return the clusters of numbers with the least sum of squared distances to their cluster's mean: the exact optimum.

    In one dimension the clusters are runs of the sorted points, so a dynamic programme over the last run finds them, in
    O(num_clusters K²). Equal numbers stay in one cluster. Of equally good clusterings, the result is the clustering with the
    smallest last split. It is deterministic and does not depend on the order of the points. No number is read on the host.

    Args:
        points: Shape (K,), finite, float64, on any device.
        num_clusters: At least 1. More clusters than distinct numbers are never used.

    Returns:
        Cluster of every point, counted from the smallest mean. Shape (K,), int64, on the device of the points.
    """
    K = len(points)
    if min(num_clusters, K) == 1:
        return torch.zeros(K, dtype=torch.int64, device=points.device)
    if K <= FEW and points.device.type == "cpu":
        return torch.tensor(_clusters_of_few(points.tolist(), num_clusters), device="cpu")
    ascending, order = points.sort()
    ascending = ascending / ascending.abs().max().clamp(min=1e-300)  # against under- and overflow of the squares
    is_larger = ascending[1:] > ascending[:-1]  # than the point before: only there a run can start
    error = _spreads(ascending)
    starts = torch.where(is_larger[:, None], error[1:], torch.inf)  # [a - 1, j]: error of the run a..j, if a run starts at a

    best = error[0]  # [j]: least error of the points 0..j in as many clusters as so far
    splits = []
    for _ in range(min(num_clusters, K) - 1):
        best, split = (best[:-1, None] + starts).min(dim=0)
        splits.append(split)

    labels = torch.zeros_like(order)
    distinct, end = is_larger.sum(), torch.full_like(order[:1], K - 1)
    for level in range(len(splits), 0, -1):
        is_used = distinct >= level
        begin = splits[level - 1].gather(0, end) + 1
        labels[1:] += is_used & (_places(K, points.device) >= begin)
        end = torch.where(is_used, begin - 1, end)
    return torch.zeros_like(order).scatter_(0, order, labels)


def _clusters_of_few(points: list[float], num_clusters: int) -> list[int]:
    """Return the same clusters, with the same rounding, by loops. Length K."""
    K, inf = len(points), float("inf")
    order = sorted(range(K), key=points.__getitem__)
    scale = max(*map(abs, points), 1e-300)
    x = [points[k] / scale for k in order]
    error = _spreads_of_few(x)
    starts = [a for a in range(1, K) if x[a] > x[a - 1]]
    best, splits = error[0], []
    for _ in range(min(num_clusters, len(starts) + 1) - 1):
        # The least error and its start, the smallest of equally good ones
        pairs = [min(((best[a - 1] + error[a][j], a) for a in starts if a <= j), default=(inf, 0)) for j in range(K)]
        best = [least for least, _ in pairs]
        splits.append([a for _, a in pairs])
    labels, end = [0] * K, K
    for label in range(len(splits), -1, -1):
        begin = splits[label - 1][end - 1] if label else 0
        for place in range(begin, end):
            labels[order[place]] = label
        end = begin
    return labels


def _spreads_of_few(x: list[float]) -> list[list[float]]:
    """Return the numbers that `_spreads` returns, with the same rounding; zero for j < a."""
    K = len(x)
    spreads = [[0.0] * K for _ in x]
    for j in range(K):
        total = 0.0
        for a in range(j, -1, -1):
            row = 0.0  # over the pairs of a with a..j, in the order of a cumulative sum
            for k in range(a, j + 1):
                row += (x[a] - x[k]) * (x[a] - x[k])
            total += row
            spreads[a][j] = total / (j - a + 1)
    return spreads


def _spreads(ascending: Tensor) -> Tensor:
    """Return the sums of squared distances to the mean in every run a..j of the points, infinite for j < a. Shape (K, K).

    Such a sum is the sum of the squared distances of all pairs over the size of the run. No term is negative, so that nothing
    cancels.
    """
    pairs = (ascending[:, None] - ascending).square().triu()
    sums = pairs.cumsum(dim=1).flip(0).cumsum(dim=0).flip(0)  # [a, j]: over all pairs with a <= i <= k <= j
    sizes, outside = _sizes(len(ascending), ascending.device)
    return sums / sizes + outside


@lru_cache(maxsize=8)
def _places(K: int, device: torch.device) -> Tensor:
    """Return the places 1, ..., K - 1."""
    with torch.inference_mode(mode=False):  # they are used in later steps too
        return torch.arange(1, K, device=device)


@lru_cache(maxsize=8)
def _sizes(K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sizes of all runs a..j, and infinity for j < a, else zero. Shapes (K, K)."""
    with torch.inference_mode(mode=False):
        places = torch.arange(K, dtype=torch.float64, device=device)
        sizes = places - places[:, None] + 1
        return sizes.clamp(min=1), torch.zeros_like(sizes).masked_fill_(sizes < 1, torch.inf)
