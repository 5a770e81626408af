"""Clusters of numbers by one-dimensional k-means: GO4Align's grouping."""

from __future__ import annotations

import numpy as np

from .linear_algebra import Array, Indices


def k_means_1d(points: Array, num_clusters: int) -> Indices:
    """Return the clusters of numbers with the least sum of squared distances to their cluster's mean: the exact optimum.

    In one dimension the clusters are runs of the sorted points, so a dynamic programme over the last run finds them, in
    O(num_clusters K²). Equal numbers stay in one cluster. Of equally good clusterings, the result is the clustering with the
    smallest last split. It is deterministic and does not depend on the order of the points.

    Args:
        points: Shape (K,), finite.
        num_clusters: At least 1. More clusters than distinct numbers are never used.

    Returns:
        Cluster of every point, counted from the smallest mean. Shape (K,).
    """
    values, inverse, counts = np.unique(points, return_inverse=True, return_counts=True)
    m = len(values)
    values = values / max(float(np.abs(values).max()), 1e-300)  # against under- and overflow of the squares
    error = _spreads(values, counts)  # [a, j]: squared distances within the run values[a..j]

    best = error[0]  # [j]: least error of values[0..j] in as many clusters as so far
    splits: list[Indices] = []
    for _ in range(min(num_clusters, m) - 1):
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + error  # [a, j]: the last run starts at a
        splits.append(total.argmin(axis=0))
        best = total.min(axis=0)

    labels, end = np.zeros(m, dtype=np.intp), m
    for split in reversed(splits):
        begin = split[end - 1]
        labels[begin:end] = len(splits)
        splits = splits[:-1]
        end = begin
    return labels[inverse]


def _spreads(values: Array, counts: Indices) -> Array:
    """Return the sums of squared distances to the mean in every run a..j of the values, infinite for j < a. Shape (m, m).

    By Welford's update, one value more at a time for all starts at once: sums of squares would cancel.
    """
    m = len(values)
    spreads = np.full((m, m), np.inf)
    size, mean, spread = np.zeros(m), np.zeros(m), np.zeros(m)  # of the runs that start at a
    for j, (value, count) in enumerate(zip(values, counts, strict=True)):
        size[: j + 1] += count
        distance = value - mean[: j + 1]
        mean[: j + 1] += distance * count / size[: j + 1]
        spread[: j + 1] += count * distance * (value - mean[: j + 1])
        spreads[: j + 1, j] = spread[: j + 1]
    return spreads
