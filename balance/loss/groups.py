"""GO4Align: weights shared within groups of tasks of similar risk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from ..rules.registry import loss_balancers
from ..solvers.kmeans import k_means_1d
from ._checks import ADD_CONSTANT, DIVISION, of_tasks, require_above, set_of_tasks, values, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

Grouping = Literal["kmeans", "spectral", "sdp"]


@loss_balancers.register(
    "go4align",
    label="GO4Align",
    paper="Shen et al. 2024, https://arxiv.org/abs/2404.06486",
    remedies=("training pace",),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class GO4Align(nn.Module):
    r"""Risk-guided weights, averaged within groups of tasks that are formed anew at each step.

    .. math::
        q = \operatorname{softmax}\Bigl(-\beta \sum_{s \le t} L(s)\Bigr), \qquad
        \gamma_k = q_k \frac{\sum_j L_j}{L_k}, \qquad
        \omega_k = \operatorname{mean}\{\gamma_j : j \text{ in the group of } k\}

    The indicators γ scale all losses to one level, which is lower for tasks with a large accumulated loss. k-means on γ forms
    the groups. The whole history counts. :math:`\sum_k \gamma_k L_k = \sum_k L_k` and
    :math:`\sum_k \omega_k = \sum_k \gamma_k`. One group gives equal weights; K groups give γ. An absent task is in no group
    and accumulates nothing.

    Args:
        num_tasks: Number of tasks, K.
        num_groups: Number of groups, at least 1; a number above K has the effect of K.
        step_size: β ≥ 0, per unit of loss, or per initial loss with ``relative_step``.
        relative_step: Whether the history accumulates every loss divided by the first loss of its task. Then q does not depend
            on the scale of any loss. False is the paper's rule; with losses in the thousands its β must be smaller.
        grouping: Method that forms the groups. ``"kmeans"``: exact k-means. ``"spectral"``: spectral clustering by
            scikit-learn, slow. ``"sdp"``: a semi-definite relaxation of k-means by cvxpy, slow, whose groups are connected
            components.

    Raises:
        ValueError: If an option is out of range.
        ImportError: At the first step, if the grouping needs a library that is not installed.

    Source:
        Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024, algorithm 1, with the scale
        of its code, which is K times the paper's. Differs: the groups are the exact optimum of the 1-D k-means problem, where
        the code draws random centres and can loop for ever. The default is two groups, where the code's single group turns
        the method off. The history is a sum of losses, so that it cannot underflow. ``relative_step`` is an addition of this
        library.
    """

    cumulative_losses: Tensor
    initial_losses: Tensor | None

    def __init__(
        self,
        num_tasks: int,
        num_groups: int = 2,
        step_size: float = 1e-4,
        grouping: Grouping = "kmeans",
        *,
        relative_step: bool = False,
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups of 'go4align' must be at least 1, but got {num_groups}.")
        if not step_size >= 0:
            raise ValueError(f"step_size of 'go4align' must not be negative, but got {step_size}.")
        self.num_groups = num_groups
        self.step_size = step_size
        self.grouping = grouping
        self.stays_on_device = grouping == "kmeans"
        self.register_buffer("cumulative_losses", torch.zeros(num_tasks, dtype=torch.float64, device="cpu"))
        first = torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu") if relative_step else None
        self.register_buffer("initial_losses", first)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the mean indicator of their group, and add the losses to the history.

        Args:
            losses: Positive values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive.
        """
        L = values(losses)
        require_above(L, 0, "go4align", DIVISION, ADD_CONSTANT)
        initial = None if self.initial_losses is None else first_losses(of_tasks(self.initial_losses, present), L)
        cumulative = values(of_tasks(self.cumulative_losses, present)) + (L if initial is None else L / initial)
        q = (-self.step_size * cumulative).softmax(dim=0)
        indicators = q * (L.sum() / L)
        groups = _GROUPINGS[self.grouping](indicators, self.num_groups)
        weighted = weigh(losses, group_means(indicators, groups))
        # Last, because a grouping can raise an error: its library is missing, or its solver fails
        set_of_tasks(self.cumulative_losses, present, cumulative)
        if self.initial_losses is not None and initial is not None:
            set_of_tasks(self.initial_losses, present, initial)
        return weighted


def first_losses(recorded: Tensor, losses: Tensor) -> Tensor:
    """Return the recorded first losses, and the present losses where none is recorded (NaN). Shapes (K,), (K,) -> (K,)."""
    return losses.where(recorded.isnan(), recorded.to(losses))


def group_means(indicators: Tensor, groups: Tensor) -> Tensor:
    """Return the group mean of every number. Shapes (K,), (K,) -> (K,)."""
    together = (groups[:, None] == groups).to(indicators)
    return (together @ indicators) / together.sum(dim=1)


def spectral(indicators: Tensor, num_groups: int) -> Tensor:
    """Group numbers by spectral clustering, with the affinity exp(-(x - y)² / variance). Shape (K,)."""
    from sklearn.cluster import SpectralClustering  # noqa: PLC0415 - an option, not a dependency

    points = indicators.numpy()
    if len(np.unique(points)) <= num_groups or num_groups == 1:
        return k_means_1d(indicators, num_groups)
    distances = (points[:, None] - points) / points.std()
    affinity = np.exp(-(distances**2)) + 1e-9  # zero affinities would disconnect the graph
    clustering = SpectralClustering(num_groups, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    return torch.from_numpy(clustering.fit_predict(affinity).astype(np.int64))


def semidefinite(indicators: Tensor, num_groups: int) -> Tensor:
    """Group numbers by the semi-definite relaxation of k-means.

    The relaxation is tight if the groups are well separated. Otherwise it can return fewer groups than ``num_groups``.

    Args:
        indicators: Shape (K,), on the host.
        num_groups: Number of groups, at least 1.

    Returns:
        Group of every number. Shape (K,).

    Source:
        Peng & Wei, "Approximating K-means-type Clustering via Semidefinite Programming", SIAM J. Optim. 2007.
    """
    import cvxpy as cp  # noqa: PLC0415 - an option, not a dependency
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    points = indicators.numpy()
    K = len(points)
    if num_groups >= K:
        return torch.arange(K, device="cpu")
    distances = (points[:, None] - points) ** 2
    Z = cp.Variable((K, K), PSD=True)
    constraints = [Z >= 0, cp.sum(Z, axis=1) == 1, cp.trace(Z) == num_groups]
    cp.Problem(cp.Minimize(cp.sum(cp.multiply(distances / max(distances.max(), 1e-300), Z))), constraints).solve()
    return torch.from_numpy(connected_components(Z.value > 0.5 / K, directed=False)[1].astype(np.int64))


_GROUPINGS = {"kmeans": k_means_1d, "spectral": spectral, "sdp": semidefinite}
