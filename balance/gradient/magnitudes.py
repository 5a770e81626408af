"""Rules that balance the lengths of the task gradients: GradNorm and the EnCodec balancer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from ..rules.context import TaskError
from ..rules.registry import gradient_balancers
from ..solvers.linear_algebra import gradient_norms
from ._host import solve
from ._state import indices, loss_values, numbers_by_task, read, vector, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..solvers.linear_algebra import Array
    from ..types import Gramian, Weights


@gradient_balancers.register(
    "gradnorm",
    heads="unweighted",
    label="GradNorm",
    paper="Chen et al. 2018, https://arxiv.org/abs/1711.02257",
    remedies=("gradient length", "training pace"),
    needs=("positive losses",),
    invariances=("permutation_equivariant", "rotation_equivariant"),
)
class GradNorm(nn.Module):
    r"""Weights learned so that the weighted gradients of slow tasks are longer.

    With logits s, :math:`w = K \operatorname{softmax}(s)`, the lengths :math:`n_k` of the gradients, and the pace
    :math:`r_k = L_k / L_k(0)` relative to its mean over the tasks,

    .. math:: E(s) = \sum_k \Bigl| w_k n_k - \bar n \, r_k^\alpha \Bigr|, \qquad \bar n = \tfrac1K \textstyle\sum_k w_k n_k

    where the second term is a constant. The weights w of a step are from the logits before the step. Then s takes one step of
    gradient descent on E, with rate ``lr``. Weights are positive and sum to K; all are 1 at first. L(0) is the loss of a task's
    first step. A zero gradient adds nothing to the gradient of E. The rate is not scale-free: long gradients move the
    weights faster. One task has weight 1. The balancer's option ``measure=`` restricts the lengths to the last shared layer,
    as in the paper.

    Args:
        num_tasks: Number of tasks, K.
        alpha: α ≥ 0; the larger, the stronger the pull to one common pace. 0 makes the lengths equal.
        lr: Learning rate of the logits, positive.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", ICML 2018,
        algorithm 1. Differs as in LibMTL: the weights are a softmax, where the paper learns them and rescales them; heads get
        the plain sum. Differs from LibMTL: L(0) is the loss of the first step, where LibMTL takes the mean of the first epoch
        and learns from the second; the logits have their own SGD, where LibMTL adds them to the model's optimizer.
    """

    logits: Tensor
    first_losses: Tensor

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha of 'gradnorm' must not be negative, but got {alpha}.")
        if not lr > 0:
            raise ValueError(f"lr of 'gradnorm' must be positive, but got {lr}.")
        self.alpha = alpha
        self.lr = lr
        self.register_buffer("logits", vector(num_tasks, 1.0))
        self.register_buffer("first_losses", vector(num_tasks, torch.nan))

    def forward(self, gramian: Gramian, losses: Tensor | None = None, present: Tensor | None = None) -> Weights:
        """Return the weights, and learn from the lengths and the losses.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            losses: Values of the losses, not negative, the first of a task positive; None for ones. Shape (K,).
            present: Indices of the tasks; None for all.

        Returns:
            Positive weights that sum to K. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
            TaskError: If a loss is negative, or the first loss of a task is not positive.
        """
        tasks = indices(present, self.logits)
        return solve(lambda G: self._step(gradient_norms(G), losses, tasks), gramian)

    def _step(self, norms: Array, losses: Tensor | None, tasks: Tensor) -> Array:
        pace = self._pace(losses, tasks)
        s = read(self.logits, tasks)
        w: Array = len(s) * softmax(s)
        lengths = w * norms
        pull = np.sign(lengths - lengths.mean() * pace**self.alpha) * norms
        write(self.logits, tasks, s - self.lr * w * (pull - w @ pull / len(w)))
        return w

    def _pace(self, losses: Tensor | None, tasks: Tensor) -> Array:
        """Return the losses relative to the first losses, divided by their mean. Shape (K,)."""
        L = loss_values(losses, len(tasks), "gradnorm", "takes a power of it", zero=True)
        first = read(self.first_losses, tasks)
        first = np.where(np.isnan(first), L, first)
        if (first == 0).any():
            reason = "Loss of task {task} is 0 at its first step, but must be positive, because 'gradnorm' divides by it."
            raise TaskError(int((first == 0).argmax()), f"{reason} Leave the task out of the dict until it has a loss.")
        write(self.first_losses, tasks, first)
        pace = L / first
        mean = pace.mean()
        return pace / mean if mean > 0 else np.ones(len(pace))


@gradient_balancers.register(
    "ema_norm",
    heads="unweighted",
    label="EnCodec balancer",
    paper="Défossez et al. 2022, https://arxiv.org/abs/2210.13438",
    remedies=("gradient length",),
    invariances=("permutation_equivariant", "rotation_equivariant", "unchanged_by_scaling_one_task"),
)
class EMANorm(nn.Module):
    r"""Weights that bring every gradient to a chosen share of a total length, on average over time.

    .. math:: w_k = R \frac{c_k}{\sum_j c_j} \frac{1}{\langle n_k \rangle}, \qquad
              \langle n_k \rangle_t = \frac{\sum_{s \le t} \beta^{t-s} n_k(s)}{\sum_{s \le t} \beta^{t-s}}

    with the lengths n of the gradients. So the average is exact from the first step, and β = 1 gives the plain mean. A constant
    factor of a loss has no effect. A task whose gradient has always been zero gets weight 0. One task gets a gradient of length
    R on average. An absent task keeps its average, and the shares of the present tasks sum to 1.

    With ``source="features"`` the lengths are of the gradients with respect to the output of the decoder, as in the paper.

    Args:
        num_tasks: Number of tasks, K.
        decay: β in 0..1, 0 excluded.
        total_norm: R, positive.
        shares: c, a positive number for every task; None for equal shares.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Défossez, Copet, Synnaeve & Adi, "High Fidelity Neural Audio Compression", TMLR 2023, section 3.4, and ``Balancer`` in
        their code. Differs: the length is of the gradient of the whole batch (``per_batch_item=False`` there), since lengths
        for each sample are no function of the Gramian; no epsilon.
    """

    totals: Tensor
    counts: Tensor

    def __init__(
        self, num_tasks: int, decay: float = 0.999, total_norm: float = 1.0, shares: list[float] | None = None
    ) -> None:
        super().__init__()
        if not 0 < decay <= 1:
            raise ValueError(f"decay of 'ema_norm' must be in 0..1, 0 excluded, but got {decay}.")
        if not total_norm > 0:
            raise ValueError(f"total_norm of 'ema_norm' must be positive, but got {total_norm}.")
        self.decay = decay
        self.total_norm = total_norm
        self.shares = numbers_by_task(shares, "shares", "ema_norm", num_tasks, None)
        self.register_buffer("totals", vector(num_tasks))
        self.register_buffer("counts", vector(num_tasks))

    def forward(self, gramian: Gramian, present: Tensor | None = None) -> Weights:
        """Return the weights, with this step included in the averages.

        Args:
            gramian: Inner products of the task gradients. Shape (K, K), positive semi-definite.
            present: Indices of the tasks; None for all.

        Returns:
            Non-negative weights. Shape (K,), dtype and device of ``gramian``.

        Raises:
            ValueError: If ``gramian`` is not a finite square matrix.
        """
        tasks = indices(present, self.totals)
        return solve(lambda G: self._step(gradient_norms(G), tasks), gramian)

    def _step(self, norms: Array, tasks: Tensor) -> Array:
        totals = self.decay * read(self.totals, tasks) + norms
        counts = self.decay * read(self.counts, tasks) + 1
        write(self.totals, tasks, totals)
        write(self.counts, tasks, counts)
        shares = self.shares[tasks.cpu().numpy()]
        nonzero = totals > 0
        weights = np.zeros(len(norms))
        weights[nonzero] = self.total_norm * (shares / shares.sum() * counts)[nonzero] / totals[nonzero]
        return weights
