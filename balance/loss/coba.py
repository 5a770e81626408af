"""CoBa: weights that let the validation losses of all tasks converge together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.context import all_indices
from ..rules.registry import loss_balancers
from ._checks import ADD_CONSTANT, DIVISION, of_tasks, require_above, values, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

FLOOR = 0.1  # least weight, relative to an equal weight
ROUNDING = 1e-12  # relative size of a slope that rounding explains


@loss_balancers.register(
    "coba",
    label="CoBa",
    paper="Gong et al. 2024, https://arxiv.org/abs/2410.06741",
    remedies=("training pace",),
    needs=("positive losses", "validation"),
    invariances=("loss_permutation_equivariant", "separable"),
)
class CoBa(nn.Module):
    r"""Convergence balancer: weights from the slopes of the validation losses, which `observe_validation` collects.

    Validation losses are divided by the first validation loss of the task. The slope a of a task is the slope of the
    least-squares line through its last ``history`` ratios. Until a task diverges, slowly converging tasks get weight. Then
    diverging tasks lose weight:

    .. math:: w = \operatorname{softmax}\bigl( K (D R + (1 - D) A) \bigr), \qquad
        R = \operatorname{softmax}_k \Bigl( \frac{K a_k}{\sum_j |a_j|} \Bigr), \quad
        A = \operatorname{softmax}_k \Bigl( \frac{-N a_k}{\sum_s |a_k(s)|} \Bigr)

    where s runs over the last N ≤ ``history`` slopes of the task. With the slope m of the largest ratio of each observation,
    and all t slopes m so far,

    .. math:: D = \min\Bigl( 1,\; t \operatorname{softmax}_s \bigl( -\tau t\, m(s) / \textstyle\sum_u |m(u)| \bigr)(t) \Bigr).

    If a weight is below 0.1 / K, all weights are mixed with equal ones: 0.9 w + 0.1 / K. Weights are constants, positive, and
    sum to one over the present tasks. They are equal until ``warmup`` observations have followed the first one. Zero slopes
    of all tasks give equal weights. One task has weight 1.

    A task that is absent from an observation has no ratio there. A task with fewer than two ratios in the history has no
    slope and the mean weight of the other tasks.

    Args:
        num_tasks: Number of tasks, K.
        tau: Temperature τ ≥ 0 of the divergence factor D.
        history: Number of observations in a line, at least 2.
        warmup: Number of observations until weights adapt, at least 2.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Gong et al., "CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models", EMNLP 2024, with the
        defaults and the floor of the authors' code (MFTCoder), which observes one validation batch at every step. Differs
        from that code: D is at most 1, as in the paper. A uses all of the last N slopes; the code drops some of them once there
        are more than ``history`` observations.
    """

    needs_validation = True
    stays_on_device = True

    first: Tensor
    ratios: Tensor
    slopes: Tensor
    weights: Tensor
    observations: Tensor

    def __init__(self, num_tasks: int, tau: float = 5.0, history: int = 200, warmup: int = 100) -> None:
        super().__init__()
        if not 0 <= tau < float("inf"):
            raise ValueError(f"tau of 'coba' must be a finite number, not negative, but got {tau}.")
        for name, number in (("history", history), ("warmup", warmup)):
            if number < 2:
                raise ValueError(f"{name} of 'coba' must be at least 2, but got {number}.")
        self.tau, self.warmup = tau, warmup
        # oldest row first; NaN where a task was absent, and before the first observation
        for name, shape in (("first", ()), ("weights", ()), ("ratios", (history,)), ("slopes", (history,))):
            self.register_buffer(name, torch.full((*shape, num_tasks), torch.nan, dtype=torch.float64, device="cpu"))
        self.register_buffer("observations", torch.zeros((), dtype=torch.int64, device="cpu"))  # after the first one
        self._worst_slopes = torch.zeros(0, dtype=torch.float64, device="cpu")  # of all observations since the warm-up

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights, which the last observation of validation losses has set.

        Args:
            losses: Finite values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).
        """
        weights = values(of_tasks(self.weights, present))
        weights = torch.where(weights.isnan(), weights.nanmean().nan_to_num(nan=1.0), weights)
        return weigh(losses, weights / weights.sum())

    def observe_validation(self, losses: Losses, present: Tensor | None = None) -> None:
        """Learn from the losses of a batch of validation data.

        Args:
            losses: Positive values of the tasks in this batch. Shape (K,).
            present: Indices of those tasks; None for all.

        Raises:
            TaskError: If a loss is not positive; the state is then as before.
        """
        tasks = all_indices(len(self.weights)) if present is None else present
        L = values(losses)
        require_above(L, 0, "coba", DIVISION, ADD_CONSTANT, quantity="Validation loss")
        known = ~values(self.first[tasks]).isnan()
        row = torch.full_like(self.first, torch.nan)
        row[tasks[known]] = L[known].to(row) / self.first[tasks[known]]
        self.first[tasks[~known]] = L[~known].to(self.first)
        if not known.any():
            return
        self.ratios.copy_(torch.cat([self.ratios[1:], row[None]]))
        self.observations += 1
        if int(self.observations) >= self.warmup:
            self._adapt()

    def _adapt(self) -> None:
        """Compute the weights anew."""
        ratios = values(self.ratios)
        slopes = line_slopes(ratios)
        self.slopes.copy_(torch.cat([self.slopes[1:], slopes.to(self.slopes)[None]]))
        worst = ratios.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
        worst_slope = line_slopes(torch.where(worst.isinf(), torch.nan, worst)).nan_to_num(nan=0.0)
        self._worst_slopes = torch.cat([self._worst_slopes, worst_slope])
        known = ~slopes.isnan()
        if known.any():
            past = values(self.slopes)[:, known]
            self.weights[known] = coba_weights(past, self._worst_slopes, self.tau).to(self.weights)

    def get_extra_state(self) -> Tensor:
        """Return the slopes of the largest ratio since the warm-up, for state_dict. Shape (n,), float64."""
        return self._worst_slopes

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the slopes of the largest ratio."""
        self._worst_slopes = state.detach().to("cpu", torch.float64, copy=True)


def coba_weights(slopes: Tensor, worst_slopes: Tensor, tau: float) -> Tensor:
    """Return the weights of CoBa.

    Args:
        slopes: Slopes of each task at the last observations, the newest last; NaN where a task had none. Shape (N, K).
        worst_slopes: Slopes of the largest ratio, the newest last. Shape (t,).
        tau: Temperature of the divergence factor.

    Returns:
        Positive, sum one. Shape (K,).
    """
    current, K = slopes[-1], slopes.shape[1]
    relative = (K * _quotient(current, current.abs().sum())).softmax(dim=0)
    lengths = (~slopes.isnan()).sum(dim=0)
    absolute = (-lengths * _quotient(current, slopes.abs().nansum(dim=0))).softmax(dim=0)
    t = len(worst_slopes)
    factor = min(1.0, t * float((-tau * t * _quotient(worst_slopes, worst_slopes.abs().sum())).softmax(dim=0)[-1]))
    weights = (K * (factor * relative + (1 - factor) * absolute)).softmax(dim=0)
    if (weights < FLOOR / K).any():
        weights = (1 - FLOOR) * weights + FLOOR / K
    return weights


def line_slopes(columns: Tensor) -> Tensor:
    """Return the slope of the least-squares line through each column, over its row numbers.

    Args:
        columns: NaN where a column has no point. Shape (N, K).

    Returns:
        NaN for fewer than two points. Shape (K,).
    """
    is_point = ~columns.isnan()
    count = is_point.sum(dim=0)
    x = torch.arange(len(columns), dtype=columns.dtype, device="cpu")[:, None].expand_as(columns)
    x = torch.where(is_point, x - (x * is_point).sum(dim=0) / count, 0.0)
    products = x * columns.nan_to_num(nan=0.0)
    sums = products.sum(dim=0)
    sums = torch.where(sums.abs() > ROUNDING * products.abs().sum(dim=0), sums, 0.0)
    return torch.where(count >= 2, sums / x.square().sum(dim=0), torch.nan)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return a quotient whose numerator is zero wherever its denominator is. Then the quotient is zero."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
