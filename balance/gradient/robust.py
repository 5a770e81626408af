"""Krum and the trimmed mean: robust averages, which outliers among the gradients do not move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from ..rules.registry import gradient_balancers
from ._host import solve

if TYPE_CHECKING:
    from ..solvers.linear_algebra import Array
    from ..types import Direction, Gramian, Jacobian, Weights

Distance = Literal["euclidean", "squared"]
TIE = 1e-9  # relative difference of scores that counts as none


@gradient_balancers.register(
    "krum",
    heads="unweighted",
    label="Krum",
    paper="Blanchard et al. 2017, https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html",
    remedies=("domination",),
    invariances=("rotation_equivariant", "scales_with_the_gradients"),
)
def krum(gramian: Gramian, *, num_byzantine: int = 0, num_selected: int = 1, distance: Distance = "euclidean") -> Weights:
    r"""Return weights that average the gradients nearest to their neighbours, and drop all other gradients.

    The score of a gradient is the sum of its distances to its K - ``num_byzantine`` - 2 nearest neighbours. The
    ``num_selected`` gradients with the lowest scores get the weight 1 / ``num_selected``, and all others get weight 0. Of
    scores that agree to 1e-9, the score of the earlier task counts as lower. So the rule depends on the order of tied tasks:
    for three tasks two scores are always equal. One or two tasks have no neighbours; they get equal weights. Zero gradients
    are gradients like any other.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
        num_byzantine: Number of gradients that may be arbitrary. If it is positive, K must be at least 3 more.
        num_selected: Number of gradients to average, at most K; 1 is Krum, more is Multi-Krum.
        distance: ``"euclidean"`` as in TorchJD, or ``"squared"`` as in the paper.

    Returns:
        Non-negative weights that sum to one. Shape (K,), dtype and device of ``gramian``.

    Raises:
        ValueError: If ``gramian`` is not a finite square matrix, or an option is out of range for K tasks.

    Source:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017, section 4.
        Differs: ``distance``, and the rule for one or two tasks.
    """
    if num_byzantine < 0:
        raise ValueError(f"num_byzantine of 'krum' must not be negative, but got {num_byzantine}.")

    def weights(G: Array) -> Array:
        if num_byzantine > 0 and len(G) < num_byzantine + 3:
            raise ValueError(f"num_byzantine of 'krum' must be at most {len(G)} tasks - 3, but got {num_byzantine}.")
        if not 1 <= num_selected <= len(G):
            raise ValueError(f"num_selected of 'krum' must be in 1..{len(G)}, but got {num_selected}.")
        if len(G) < 3:
            return np.full(len(G), 1 / len(G))
        selected = _lowest(_scores(G, len(G) - num_byzantine - 2, distance), num_selected)
        return np.asarray(selected / num_selected)

    return solve(weights, gramian)


def _scores(G: Array, num_neighbours: int, distance: Distance) -> Array:
    """Return the sums of the distances to the nearest neighbours. Shape (K,)."""
    squares = G.diagonal()
    distances = np.maximum(squares[:, None] + squares - 2 * G, 0.0)
    if distance == "euclidean":
        distances = np.sqrt(distances)
    np.fill_diagonal(distances, np.inf)
    scores: Array = np.sort(distances, axis=1)[:, :num_neighbours].sum(axis=1)
    return scores


def _lowest(scores: Array, count: int) -> Array:
    """Return 1 for the lowest scores and 0 for the others, the first of scores that are nearly equal. Shape (K,)."""
    tolerance = TIE * float(scores.max())
    left, selected = scores.copy(), np.zeros(len(scores))
    for _ in range(count):
        first = int(np.argmax(left <= left.min() + tolerance))
        left[first], selected[first] = np.inf, 1.0
    return selected


@gradient_balancers.register(
    "trimmed_mean",
    sees="jacobian",
    heads="unweighted",
    label="Trimmed mean",
    paper="Yin et al. 2018, https://arxiv.org/abs/1803.01498",
    remedies=("domination",),
    invariances=("permutation_equivariant", "scales_with_the_gradients"),
)
def trimmed_mean(jacobian: Jacobian, *, trim: int | None = None) -> Direction:
    """Return at every coordinate the mean of the gradients without the largest and the smallest values.

    The direction is not a function of the Gramian, and depends on the coordinates. It can conflict with tasks. A coordinate
    at which all gradients are zero stays zero.

    Args:
        jacobian: Rows are task gradients. Shape (K, P).
        trim: Number of values to drop at either end, less than K / 2. None: 1, or 0 for fewer than three tasks.

    Returns:
        Shape (P,), dtype and device of ``jacobian``.

    Raises:
        ValueError: If ``jacobian`` is not a matrix, or ``trim`` is out of range for K tasks.

    Source:
        Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, definition 2.
        Differs: a number of values in place of a fraction, as in TorchJD.
    """
    if jacobian.ndim != 2 or len(jacobian) == 0:
        raise ValueError(f"jacobian must have shape (K, P) with K >= 1, but got {tuple(jacobian.shape)}.")
    K = len(jacobian)
    drop = int(K >= 3) if trim is None else trim
    if drop < 0 or 2 * drop >= K:
        raise ValueError(f"trim of 'trimmed_mean' must be at least 0 and less than half of {K} tasks, but got {trim}.")
    return jacobian.sort(dim=0).values[drop : K - drop].mean(dim=0)
