"""FAMO: weights that let the logarithms of all losses fall equally fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from balance.loss._checks import GIVE_BOUNDS, LOGARITHM, require_above, values, weigh, widened
from balance.rules.registry import loss_balancers

if TYPE_CHECKING:
    from torch import Tensor

    from balance.types import Losses, WeightedLosses


@loss_balancers.register(
    "famo",
    label="FAMO",
    paper="Liu et al. 2023, https://arxiv.org/abs/2306.03792",
    remedies=("loss scale", "training pace"),
    needs=("positive losses", "observe"),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
class FAMO(nn.Module):
    r"""Weights that let the logarithms of all losses fall equally fast, learned from the losses after each step.

    With logits ξ, :math:`z = \operatorname{softmax}(\xi)` and :math:`D_k = L_k - b_k + 10^{-8}`,

    .. math:: \tilde L_k = \frac{z_k}{S} \log D_k, \qquad S = \sum_j z_j / D_j ,

    where z and S are constants, so that the weights :math:`z_k / (D_k S)` are positive and sum to one. After the optimizer's
    step, `observe` gets the losses L' of the same batch. Then ξ takes one Adam step along the gradient

    .. math:: v_k = z_k \Bigl(\delta_k - \sum_j z_j \delta_j\Bigr), \qquad \delta_k = \log D_k - \log D'_k ,

    to which weight decay γ is added. So a task whose loss falls faster than the other losses loses weight. With b = 0 the
    direction does not change when a loss is multiplied by a constant. One task has weight 1. An absent task keeps its logit
    and its moments, and has no effect on the present tasks.

    Args:
        num_tasks: K.
        gamma: Weight decay γ ≥ 0 of the logits.
        lr: Learning rate of the logits, positive.
        min_losses: Lower bound b of every loss, K numbers; None for zeros.
        next_batch: Learn from the losses of the next batch, at the next step, instead of observing this batch again. This
            saves the second forward pass, but treats differences between batches as progress.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 2 (appendix). γ = 1e-3 is the paper's
        choice for most problems. Differs: a loss below its bound is an error, where the code reverses the signs of the
        gradients. Clip gradients after ``backward``; the published code clips before it, which has no effect.
    """

    logits: Tensor
    mean: Tensor
    mean_square: Tensor
    steps: Tensor
    previous_losses: Tensor
    min_losses: Tensor

    def __init__(
        self,
        num_tasks: int,
        gamma: float = 1e-3,
        lr: float = 0.025,
        min_losses: list[float] | None = None,
        next_batch: bool = False,  # noqa: FBT001, FBT002 - options are given by name
    ) -> None:
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"gamma of 'famo' must not be negative, but got {gamma}.")
        if not lr > 0:
            raise ValueError(f"lr of 'famo' must be positive, but got {lr}.")
        if min_losses is not None and len(min_losses) != num_tasks:
            raise ValueError(f"min_losses of 'famo' must have one number for each of {num_tasks} tasks, but got {min_losses}.")
        self.gamma = gamma
        self.lr = lr
        self.needs_observation = not next_batch
        zeros = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")
        for name in ("logits", "mean", "mean_square", "steps"):  # Adam by task, since tasks can miss steps
            self.register_buffer(name, zeros.clone())
        self.register_buffer("previous_losses", zeros + torch.nan)  # NaN where no loss remains to be observed
        bounds = torch.tensor(min_losses or 0.0, dtype=torch.float64, device="cpu")
        self.register_buffer("min_losses", zeros + bounds, persistent=False)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the weighted logarithms of the losses, and store the losses for `observe`.

        Args:
            losses: Values not below ``min_losses``, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is below its lower bound.
        """
        tasks = self._indices(present)
        L = values(losses)
        distance = self._distance(L, tasks)
        previous = torch.full_like(self.previous_losses, torch.nan)
        previous[tasks] = L.to(previous)
        if not self.needs_observation:
            again = ~values(self.previous_losses[tasks]).isnan()
            self._learn(tasks[again], L[again])
        self.previous_losses.copy_(previous)
        z = values(self.logits[tasks]).softmax(dim=0)
        wide = widened(losses)  # 1e-8 is zero in half precision
        logarithms = (wide - self.min_losses[tasks].to(wide) + 1e-8).log()
        return weigh(logarithms, z / (z / distance).sum()).to(losses.dtype)

    def observe(self, losses: Losses, present: Tensor | None = None) -> None:
        """Take an Adam step on the logits of the present tasks.

        Args:
            losses: Losses of the same batch after the optimizer's step, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Raises:
            TaskError: If a loss is below its lower bound; the logits are then as before.
            RuntimeError: If the step's losses were not weighed before.
        """
        tasks = self._indices(present)
        previous = self.previous_losses[tasks]
        if previous.isnan().any() or self.previous_losses.isfinite().sum() != len(tasks):
            raise RuntimeError("'famo' observes losses once after each backward, of the tasks that backward was given.")
        self._learn(tasks, values(losses))
        self.previous_losses.fill_(torch.nan)

    def _learn(self, tasks: Tensor, after: Tensor) -> None:
        """Take one Adam step for tasks whose losses changed from ``previous_losses`` to ``after``."""
        delta = self._distance(values(self.previous_losses[tasks]), tasks).log() - self._distance(after, tasks).log()
        z = values(self.logits[tasks]).softmax(dim=0)
        gradient = (z * (delta - (z * delta).sum())).to(self.logits) + self.gamma * self.logits[tasks]
        self.steps[tasks] += 1
        self.mean[tasks] += (1 - 0.9) * (gradient - self.mean[tasks])
        self.mean_square[tasks] += (1 - 0.999) * (gradient**2 - self.mean_square[tasks])
        mean = self.mean[tasks] / (1 - 0.9 ** self.steps[tasks])
        mean_square = self.mean_square[tasks] / (1 - 0.999 ** self.steps[tasks])
        self.logits[tasks] -= self.lr * mean / (mean_square.sqrt() + 1e-8)

    def _indices(self, present: Tensor | None) -> Tensor:
        return torch.arange(len(self.logits), device="cpu") if present is None else present

    def _distance(self, losses: Tensor, tasks: Tensor) -> Tensor:
        bounds = values(self.min_losses[tasks])
        require_above(losses, bounds - 1e-8, "famo", LOGARITHM, GIVE_BOUNDS)
        return losses - bounds + 1e-8
