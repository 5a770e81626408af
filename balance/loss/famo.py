"""FAMO: weights that let the logarithms of all losses fall equally fast."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..rules.checks import are_delayed, beside, delay
from ..rules.context import all_indices
from ..rules.registry import loss_balancers
from ._adam import Moments, register_moments
from ._checks import GIVE_BOUNDS, LOGARITHM, masked_softmax, of_tasks, require_above, set_of_tasks, values, weigh, widened
from ._user_logits import UserLogits

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

LogitOptimizer = Literal["inner", "user"]
GAMMA, LR = 1e-3, 0.025
_ORDER = "'famo' observes losses once after each backward, of the tasks that backward was given."


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

    With ``optimizer="user"`` the logits are parameters, one scalar for each task, for an optimizer of the user's choice.
    `observe` writes v to their ``.grad``, without weight decay, which belongs to that optimizer. The optimizer can step right
    after `observe`: Adam with rate ``lr`` and weight decay γ then gives the logits of ``optimizer="inner"``. Or it is the
    optimizer of the model, with ``balancer.parameters()``. Then v is used at its next step, one step later, also if
    ``.grad`` is cleared before. A gradient that no optimizer has used is replaced by the next one.

    Args:
        num_tasks: Number of tasks, K.
        gamma: Weight decay γ ≥ 0 of the logits; None: 1e-3. Only for ``optimizer="inner"``.
        lr: Learning rate of the logits, positive; None: 0.025. Only for ``optimizer="inner"``.
        min_losses: Lower bound b of every loss, K numbers; None for zeros.
        next_batch: Learn from the losses of the next batch, at the next step, instead of observing this batch again. This
            saves the second forward pass, but treats differences between batches as progress.
        optimizer: Owner of the steps of the logits: the rule, with Adam, or the user.

    Raises:
        ValueError: If an option is out of range, or belongs to the other optimizer.

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
        gamma: float | None = None,
        lr: float | None = None,
        min_losses: list[float] | None = None,
        next_batch: bool = False,  # noqa: FBT001, FBT002 - options are given by name
        optimizer: LogitOptimizer = "inner",
    ) -> None:
        super().__init__()
        _check_rates(gamma, lr, optimizer)
        if min_losses is not None and len(min_losses) != num_tasks:
            raise ValueError(f"min_losses of 'famo' must have one number for each of {num_tasks} tasks, but got {min_losses}.")
        self.gamma = GAMMA if gamma is None else gamma
        self.lr = LR if lr is None else lr
        self.needs_observation = not next_batch
        zeros = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")
        self.user_logits = UserLogits(num_tasks) if optimizer == "user" else None
        self.stays_on_device = optimizer == "inner"
        if self.user_logits is None:
            self.register_buffer("logits", zeros.clone())
            register_moments(self, num_tasks)
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
        L = values(losses)
        bounds = values(of_tasks(self.min_losses, present))
        distance = _distance(L, bounds)
        if not self.needs_observation:
            self._learn(present, bounds, distance)
        if present is not None:
            self.previous_losses.fill_(torch.nan)
        set_of_tasks(self.previous_losses, present, L)
        z = self._values(present).softmax(dim=0)
        wide = widened(losses)  # 1e-8 is zero in half precision
        logarithms = (wide - beside(bounds, wide) + 1e-8).log()
        weighted = weigh(logarithms, z / (z / distance).sum())
        if self.user_logits is not None:
            weighted = weighted + self.user_logits.pending().to(weighted) / len(weighted)
        return weighted.to(losses.dtype)

    def observe(self, losses: Losses, present: Tensor | None = None) -> None:
        """Take an Adam step on the logits of the present tasks, or write the gradient for the user's optimizer.

        Args:
            losses: Losses of the same batch after the optimizer's step, of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Raises:
            TaskError: If a loss is below its lower bound; the logits are then as before.
            RuntimeError: If the step's losses were not weighed before.
        """
        was_present = self.previous_losses.isfinite()
        is_same_step = of_tasks(was_present, present).all() & (was_present.sum() == len(losses))
        if are_delayed():
            delay(is_same_step, lambda: RuntimeError(_ORDER))
        elif not is_same_step:
            raise RuntimeError(_ORDER)
        bounds = values(of_tasks(self.min_losses, present))
        self._learn(present, bounds, _distance(values(losses), bounds))
        self.previous_losses.fill_(torch.nan)

    def _learn(self, present: Tensor | None, bounds: Tensor, after: Tensor) -> None:
        """Take one Adam step, or write a gradient, for tasks with a loss in ``previous_losses`` and a distance ``after``."""
        before = values(of_tasks(self.previous_losses, present)) - bounds + 1e-8
        again = None  # of all present tasks
        if are_delayed() or not all(map(math.isfinite, before.tolist())):
            again = ~before.isnan()
        delta, z = before.log() - after.log(), self._values(present)
        if again is None:
            z = z.softmax(dim=0)
        else:
            delta, z = torch.where(again, delta, 0.0), masked_softmax(z, again)
        gradient = z * (delta - z @ delta)
        if self.user_logits is not None:
            tasks = all_indices(len(self.previous_losses)) if present is None else present
            self.user_logits.set_gradient(*((tasks, gradient) if again is None else (tasks[again], gradient[again])))
            return
        decayed = gradient.to(self.logits).add_(of_tasks(self.logits, present), alpha=self.gamma)
        chosen = None if again is None else again.to(self.logits.device)
        Moments(self.mean, self.mean_square, self.steps).step(self.logits, present, decayed, self.lr, chosen)

    def _values(self, present: Tensor | None) -> Tensor:
        """Return the logits of the present tasks. Shape (K,), float64."""
        logits = self.logits if self.user_logits is None else self.user_logits.values()
        return values(of_tasks(logits, present))


def _distance(losses: Tensor, bounds: Tensor) -> Tensor:
    """Return the distances of losses to their bounds, plus 1e-8. Shapes (K,)."""
    require_above(losses, bounds - 1e-8, "famo", LOGARITHM, GIVE_BOUNDS)
    return losses - bounds + 1e-8


def _check_rates(gamma: float | None, lr: float | None, optimizer: LogitOptimizer) -> None:
    """Check the options of the optimizer of the logits."""
    if optimizer == "user" and not (gamma is None and lr is None):
        raise ValueError(
            f"gamma and lr of 'famo' must be None with optimizer='user', but got {gamma} and {lr}. Give weight decay and "
            "learning rate to the optimizer that has balancer.parameters()."
        )
    if gamma is not None and not gamma >= 0:
        raise ValueError(f"gamma of 'famo' must not be negative, but got {gamma}.")
    if lr is not None and not lr > 0:
        raise ValueError(f"lr of 'famo' must be positive, but got {lr}.")
