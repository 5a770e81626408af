"""Numbers that compare whole runs: the mean drop against single-task baselines, and the mean rank of a method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy.stats import rankdata

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def delta_m(metrics: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: Collection[str]) -> float:
    r"""Return the mean relative drop against single-task baselines, in percent; a number below zero beats the baselines.

    .. math:: \Delta_m = \frac{100}{M} \sum_j s_j \frac{m_j - b_j}{b_j}, \qquad s_j = -1 \text{ where higher is better, else } 1

    The mean is over metrics, not tasks.

    Args:
        metrics: M values by name.
        baselines: Value of each of these metrics for a network that was trained on one task only. Further baselines are
            ignored.
        higher_is_better: Names of the metrics that should be large.

    Returns:
        Percentage; lower is better.

    Raises:
        ValueError: If no metric is given, or a baseline is missing or zero.

    Source:
        Maninis et al., "Attentive Single-Tasking of Multiple Tasks", CVPR 2019, eq. (4).
    """
    if not metrics:
        raise ValueError("delta_m needs at least one metric.")
    drops = []
    for name, value in metrics.items():
        baseline = baselines.get(name, 0.0)
        if baseline == 0:
            raise ValueError(f"delta_m needs a baseline of '{name}' that is not zero, but got {baselines.get(name)}.")
        drops.append((-1 if name in higher_is_better else 1) * (value - baseline) / baseline)
    return 100 * sum(drops) / len(drops)


def mean_rank(table: Mapping[str, Mapping[str, float]], higher_is_better: Collection[str] = ()) -> dict[str, float]:
    r"""Return the mean over the metrics of each method's rank among the methods; 1 is best.

    .. math:: \mathrm{MR}(a) = \frac{1}{M} \sum_j \bigl(1 + \#\{b \text{ strictly better than } a \text{ on metric } j\}\bigr)

    Methods that tie share the best of their ranks, and the next rank is skipped. The number depends on the methods that are
    compared. So never compare mean ranks of two tables, and leave single-task networks out of the table.

    Args:
        table: M values by name, for each method. NaN ranks behind every number.
        higher_is_better: Names of the metrics that should be large.

    Returns:
        Mean rank by method, from 1 to the number of methods.

    Raises:
        ValueError: If no method or no metric is given, or a method lacks a metric that another method has.

    Source:
        The MR columns of Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, and Liu et al., "FAMO", NeurIPS
        2023. This rule for ties reproduces their printed values. Some scripts rank densely, without skipping.
    """
    names = {name for metrics in table.values() for name in metrics}
    if not names:
        raise ValueError("mean_rank needs at least one method with at least one metric.")
    for method, metrics in table.items():
        if missing := names - metrics.keys():
            raise ValueError(f"mean_rank needs the same metrics of every method, but '{method}' has no {sorted(missing)}.")
    ranks = []
    for name in names:
        costs = [(-1 if name in higher_is_better else 1) * metrics[name] for metrics in table.values()]
        ranks.append(rankdata([math.inf if math.isnan(cost) else cost for cost in costs], method="min"))
    return {method: sum(float(rank[k]) for rank in ranks) / len(ranks) for k, method in enumerate(table)}
