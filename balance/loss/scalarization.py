"""Scalarisations: functions of all losses whose minimum has a preferred trade-off. Each loss gets its derivative as weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..rules.checks import beside
from ..rules.registry import loss_balancers
from ._checks import (
    ADD_CONSTANT,
    LOGARITHM,
    numbers_by_task,
    of_tasks,
    require_above,
    softmax,
    values,
    weigh,
    widened,
)
from .improvable_gap import BaseLosses

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

Form = Literal["log", "plain"]
Augmentation = Literal["augmented", "modified"]

ROUNDING = 1e-12  # relative size of a distance that rounding explains


class Preference:
    """Preference λ and reference point z of a scalarisation, one number each for every task, present or not.

    Args:
        num_tasks: Number of tasks, K.
        preference: Numbers that are not negative, and not all zero; None for 1 / K, with K tasks present.
        reference: Finite numbers; None for zeros.
        method: Name of the rule, for messages.

    Raises:
        ValueError: If there is not one number for each task, or a number is out of range.
    """

    def __init__(self, num_tasks: int, preference: list[float] | None, reference: list[float] | None, method: str) -> None:
        self.preference = numbers_by_task(preference, num_tasks, "preference", method)
        self.reference = numbers_by_task(reference, num_tasks, "reference", method, non_negative=False)

    def weights(self, losses: Tensor, present: Tensor | None) -> Tensor:
        """Return the preferences of the present tasks. Shape (K,) -> (K,)."""
        if self.preference is None:
            return torch.full_like(losses, 1 / len(losses))
        return beside(self.preference if present is None else self.preference[present], losses)

    def shifted(self, losses: Tensor, present: Tensor | None) -> Tensor:
        """Return the losses of the present tasks minus their reference points. Shape (K,) -> (K,)."""
        if self.reference is None:
            return losses
        return losses - beside(self.reference if present is None else self.reference[present], losses)


@loss_balancers.register(
    "stch",
    label="STCH",
    paper="Lin et al. 2024, https://arxiv.org/abs/2402.19078",
    remedies=("loss scale", "training pace"),
    needs=("positive losses", "end_epoch"),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
class SmoothTchebycheff(nn.Module):
    r"""Smooth Tchebycheff scalarisation: a smooth maximum of the losses, relative to their means in an early epoch.

    With ``form="log"`` and the mean losses n of epoch ``warmup_epochs``,

    .. math:: \tilde L_k = K p_k \log L_k, \qquad p = \operatorname{softmax}\bigl( \log(L / n) / \mu \bigr)

    where p is a constant. The sum has the gradient of :math:`K \mu \log \sum_j (L_j / n_j)^{1/\mu}`. Until the end of
    that epoch all factors :math:`K p_k` are 1. The gradient does not change when a loss is multiplied by a constant from
    the start. A task that is absent from that epoch has factor 1 until the end of its first later epoch.

    With ``form="plain"``, preference λ and reference point z,

    .. math:: \tilde L_k = \lambda_k p_k L_k, \qquad p = \operatorname{softmax}\bigl( \lambda \circ (L - z) / \mu \bigr)

    which has the gradient of :math:`\mu \log \sum_j \exp(\lambda_j (L_j - z_j) / \mu)`. There is no warm-up, and losses of
    either sign are allowed. For small μ both forms approach the maximum. Absent tasks take no part.

    Args:
        num_tasks: Number of tasks, K.
        mu: Smoothing μ > 0.
        warmup_epochs: Epoch whose mean losses are n, counted from 0. Only for ``form="log"``.
        form: The formula; None: plain if a preference or a reference point is given, else logarithmic.
        preference: λ for ``form="plain"``, not negative, used as given; None for 1 / K.
        reference: Ideal point z for ``form="plain"``; None for zeros.

    Raises:
        ValueError: If an option is out of range, or belongs to the other form.

    Source:
        Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, is the plain form.
        Logarithms, factor K and warm-up are as in the authors' multi-task code and in LibMTL. Differs: no
        1e-20 inside of the logarithms, so that a loss of zero is an error. The value of the sum is not the scalarisation.
    """

    stays_on_device = True

    def __init__(
        self,
        num_tasks: int,
        mu: float = 1.0,
        warmup_epochs: int = 4,
        form: Form | None = None,
        preference: list[float] | None = None,
        reference: list[float] | None = None,
    ) -> None:
        super().__init__()
        if form is None:
            form = "log" if preference is None and reference is None else "plain"
        if not mu > 0:
            raise ValueError(f"mu of 'stch' must be positive, but got {mu}.")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs of 'stch' must not be negative, but got {warmup_epochs}.")
        if form == "log" and not (preference is None and reference is None):
            raise ValueError(
                "preference and reference of 'stch' must be None with form='log', which has none, but got "
                f"{preference} and {reference}. Use form='plain'."
            )
        self.mu, self.form = mu, form
        self.needs_epochs = form == "log"
        self.target = Preference(num_tasks, preference, reference, "stch")
        self.nadir = BaseLosses(num_tasks, warmup_epochs, "stch")

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the weighted losses, or the weighted logarithms of the losses.

        Args:
            losses: Values of the present tasks, positive with ``form="log"``. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive and its logarithm is taken.
        """
        L = values(losses)
        if self.form == "plain":
            preference = self.target.weights(L, present)
            p = softmax(preference * self.target.shifted(L, present), self.mu)
            return weigh(losses, preference * p)
        require_above(L, 0, "stch", LOGARITHM, ADD_CONSTANT)
        nadir = values(of_tasks(self.nadir.base, present))
        known = ~nadir.isnan()
        relative = torch.where(known, L.log() - nadir.log(), -torch.inf)
        factors = torch.where(known, known.sum() * softmax(relative, self.mu), 1.0)
        return weigh(widened(losses).log(), factors).to(losses.dtype)

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Close an epoch with mean losses of shape (K,), NaN for tasks that were never present."""
        if self.form == "log":
            self.nadir.end_epoch(mean_losses)


@loss_balancers.register(
    "tchebycheff",
    label="Tchebycheff",
    paper="Bowman 1976, https://doi.org/10.1007/978-3-642-87563-2_5; Steuer & Choo 1983, https://doi.org/10.1007/BF02591870",
    remedies=("training pace",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class Tchebycheff:
    r"""Tchebycheff scalarisation: the largest of the weighted losses gets the gradient.

    .. math:: \max_k \lambda_k (L_k - z_k) + \rho \sum_j (L_j - z_j)

    The weight of a loss is its derivative: λ for the largest term, and ρ for all losses. Terms of exactly the same size
    share the gradient equally. With ``form="modified"`` the sum is inside of the maximum,

    .. math:: \max_k \lambda_k \Bigl( L_k - z_k + \rho \sum_j (L_j - z_j) \Bigr) .

    With ρ = 0 both are equal, and every loss except the largest has weight zero. A small positive ρ excludes solutions
    that are only weakly Pareto optimal. One task keeps its direction. Absent tasks take no part.

    Args:
        num_tasks: Number of tasks, K.
        preference: λ, not negative, used as given; None for 1 / K. For the form with divisors give their inverses.
        reference: Ideal point z; None for zeros.
        rho: ρ ≥ 0.
        form: Place of the sum.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Bowman, "On the Relationship of the Tchebycheff Norm and the Efficient Frontier of Multiple-Criteria Objectives", 1976;
        augmented as by Steuer & Choo, Math. Program. 1983, modified as by Kaliszewski, Comput. Oper. Res. 1987. Differs: no
        absolute values, so that a loss below its reference point counts as small.
    """

    stays_on_device = True

    def __init__(
        self,
        num_tasks: int,
        preference: list[float] | None = None,
        reference: list[float] | None = None,
        rho: float = 0.0,
        form: Augmentation = "augmented",
    ) -> None:
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho of 'tchebycheff' must be a finite number, not negative, but got {rho}.")
        self.rho, self.form = rho, form
        self.target = Preference(num_tasks, preference, reference, "tchebycheff")

    def __call__(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by their derivatives.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        L = values(losses)
        preference, distance = self.target.weights(L, present), self.target.shifted(L, present)
        modified = self.form == "modified"
        terms = preference * (distance + self.rho * distance.sum() if modified else distance)
        largest = (terms == terms.max()).to(L)
        shares = preference * largest / largest.sum()
        return weigh(losses, shares + self.rho * (shares.sum() if modified else 1))


@loss_balancers.register(
    "cosmos",
    label="COSMOS",
    paper="Ruchte & Grabocka 2021, https://arxiv.org/abs/2103.13392",
    remedies=("domination",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class Cosmos:
    r"""COSMOS: the weighted sum of the losses minus the cosine between losses and preference.

    .. math:: r^\top L - \lambda \frac{r^\top L}{\lVert r \rVert \lVert L \rVert}

    The weight of a loss is its derivative, which is negative for a loss that is far too small relative to the preference.
    If all losses are zero, the cosine counts as constant. One task has weight r. Absent tasks take no part.

    Args:
        num_tasks: Number of tasks, K.
        preference: r, not negative, used as given; None for 1 / K.
        penalty: λ ≥ 0; 0.01 to 8 in the paper.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Ruchte & Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021. The paper
        draws r from a Dirichlet distribution at every step and makes it an input of the network. Here r is fixed.
    """

    stays_on_device = True

    def __init__(self, num_tasks: int, preference: list[float] | None = None, penalty: float = 1.0) -> None:
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"penalty of 'cosmos' must be a finite number, not negative, but got {penalty}.")
        self.penalty = penalty
        self.target = Preference(num_tasks, preference, None, "cosmos")

    def __call__(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by their derivatives.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        L = values(losses)
        r = self.target.weights(L, present)
        lengths = r.norm(), L.norm()
        r_unit, L_unit = r / lengths[0], L / lengths[1]
        cosine_derivative = (r_unit - (r_unit @ L_unit) * L_unit) / lengths[1]
        has_cosine = torch.minimum(*lengths) > 0  # else a direction is missing
        return weigh(losses, r - torch.where(has_cosine, self.penalty * cosine_derivative, 0.0))


@loss_balancers.register(
    "pbi",
    label="PBI",
    paper="Zhang & Li 2007, https://doi.org/10.1109/TEVC.2007.892759",
    remedies=("domination",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class PenaltyBoundaryIntersection:
    r"""Penalty-based boundary intersection: distance along a preferred direction, plus the distance to this direction.

    .. math:: d_1 + \theta d_2, \qquad d_1 = (L - z)^\top \hat w, \quad d_2 = \lVert L - z - d_1 \hat w \rVert,
        \quad \hat w = w / \lVert w \rVert

    The weight of a loss is its derivative, which is negative for a loss that is small relative to the direction. On the
    direction :math:`d_2` has no derivative and counts as constant, also where only rounding separates the losses from it. One
    task has weight 1. Absent tasks take no part.

    Args:
        num_tasks: Number of tasks, K.
        preference: Direction w, not negative; None for equal entries.
        theta: Penalty θ ≥ 0.
        reference: Ideal point z; None for zeros.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Zhang & Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Trans. Evol. Comput. 2007,
        section II, with θ = 5. Differs from TorchJD: no 1e-12 inside of the square root.
    """

    stays_on_device = True

    def __init__(
        self,
        num_tasks: int,
        preference: list[float] | None = None,
        theta: float = 5.0,
        reference: list[float] | None = None,
    ) -> None:
        if not 0 <= theta < float("inf"):
            raise ValueError(f"theta of 'pbi' must be a finite number, not negative, but got {theta}.")
        self.theta = theta
        self.target = Preference(num_tasks, preference, reference, "pbi")

    def __call__(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by their derivatives.

        Args:
            losses: Any finite values, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        L = values(losses)
        w, distance = self.target.weights(L, present), self.target.shifted(L, present)
        w = (w / w.norm()).nan_to_num(nan=0.0)  # zero if all present tasks have preference zero
        across = distance - (distance @ w) * w
        length = across.norm()
        has_second_distance = (length > ROUNDING * distance.norm()) & w.any()
        return weigh(losses, w + torch.where(has_second_distance, self.theta * across / length, 0.0))
