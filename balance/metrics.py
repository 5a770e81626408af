"""Numbers that compare whole runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def delta_m(metrics: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: Collection[str]) -> float:
    r"""Mean relative drop against single-task baselines, in percent; lower is better, below zero beats the baselines.

    .. math:: \Delta_m = \frac{100}{M} \sum_j s_j \frac{m_j - b_j}{b_j}, \qquad s_j = -1 \text{ where higher is better, else } 1

    The mean is over metrics, not tasks.

    Args:
        metrics: M values by name.
        baselines: Value of each of these metrics for a network trained on its task alone; further ones are ignored.
        higher_is_better: Names of the metrics that should be large.

    Raises:
        ValueError: If there are no metrics, or a baseline is missing or zero.

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
