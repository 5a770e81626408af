"""IGBv1 and IGBv2, improvable gap balancing: larger weights for losses that are large relative to an early epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rules.registry import loss_balancers
from ._checks import ADD_CONSTANT, DIVISION, LOGARITHM, masked_softmax, of_tasks, require_above, values, weigh
from ._sac import Agent

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

STEPS_BETWEEN_TRAININGS = 50
FIRST_TRAINING_EPOCH = 3
EXPLORATION_EPOCHS = 5


class BaseLosses(nn.Module):
    """Mean losses of one epoch, by which later losses are divided.

    Args:
        num_tasks: Number of tasks, K.
        epoch: The epoch, counted from 0. For a task that is absent from this epoch, its first later epoch counts.
        method: Name of the rule, for messages.
    """

    base: Tensor
    epochs: Tensor

    def __init__(self, num_tasks: int, epoch: int, method: str) -> None:
        super().__init__()
        if epoch < 0:
            raise ValueError(f"base_epoch of '{method}' must not be negative, but got {epoch}. Use 0 for the first epoch.")
        self.epoch = epoch
        self.method = method
        self.register_buffer("base", torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu"))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64, device="cpu"))  # number of epochs that have ended

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Close an epoch with mean losses of shape (K,), NaN for tasks that were never present."""
        if self.epochs >= self.epoch:
            seen = values(mean_losses).nan_to_num(nan=1.0)  # an absent task has no mean that could be out of range
            require_above(seen, 0, self.method, DIVISION, ADD_CONSTANT, quantity="Mean loss")
            self.base.copy_(torch.where(self.base.isnan(), mean_losses.to(self.base), self.base))
        self.epochs += 1


@loss_balancers.register(
    "igbv1",
    label="IGBv1",
    paper="Dai et al. 2023, https://proceedings.mlr.press/v216/dai23a.html",
    remedies=("training pace",),
    needs=("positive losses", "end_epoch"),
    invariances=("loss_permutation_equivariant", "gradient_unchanged_by_scaling_a_loss", "separable"),
)
class IGBv1(nn.Module):
    r"""Improvable gap balancing: larger weights for the logarithms of losses that are large relative to an early epoch.

    .. math:: \tilde L_k = w_k \log L_k, \qquad w = K \operatorname{softmax}(L / b)

    with the mean losses b of epoch ``base_epoch``; all weights are 1 until the end of that epoch. Weights sum to K and are
    constants. Gradients do not change when a loss is multiplied by a constant from the start. One task has weight 1. Absent
    tasks take no part in the softmax.

    Args:
        num_tasks: Number of tasks, K.
        base_epoch: Epoch whose mean losses are the base, counted from 0.

    Raises:
        ValueError: If ``base_epoch`` is negative.

    Source:
        Dai, Fei & Lu, "Improvable Gap Balancing for Multi-Task Learning", UAI 2023, with the formulas of its code. Differs: the
        base losses are means over the steps at which a task was present.
    """

    needs_epochs = True
    stays_on_device = True

    def __init__(self, num_tasks: int, base_epoch: int = 1) -> None:
        super().__init__()
        self.reference = BaseLosses(num_tasks, base_epoch, "igbv1")

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Return the weighted logarithms of the losses.

        Args:
            losses: Positive values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive.
        """
        L = values(losses)
        require_above(L, 0, "igbv1", LOGARITHM, ADD_CONSTANT)
        base = values(of_tasks(self.reference.base, present))
        known = ~base.isnan()
        weights = torch.where(known, known.sum() * masked_softmax(L / base, known), 1.0)
        return weigh(losses.log(), weights)

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Close an epoch with mean losses of shape (K,), NaN for tasks that were never present."""
        self.reference.end_epoch(mean_losses)


@loss_balancers.register(
    "igbv2",
    label="IGBv2",
    paper="Dai et al. 2023, https://proceedings.mlr.press/v216/dai23a.html",
    remedies=("training pace",),
    needs=("positive losses", "end_epoch", "all tasks"),
    invariances=("separable",),
)
class IGBv2(nn.Module):
    r"""Improvable gap balancing by a soft actor-critic agent, which chooses the weights of the logarithms of the losses.

    .. math:: \tilde L_k = a_k \log L_k, \qquad a = K \operatorname{softmax}(u), \quad u \sim \mathcal N(\mu(L), \sigma(L))

    The agent observes the losses L. Its reward is the smallest relative improvement,
    :math:`\min_k (L_k(t-1) - L_k(t)) / b_k`, with the mean losses b of epoch ``base_epoch``. After that epoch the agent stores
    transitions. From the fourth epoch it trains every 50 steps. Until the end of the fifth epoch, weights are random. Weights
    are positive, sum to K and are constants. One task has weight 1. All tasks must be present at every step, since the losses
    are the agent's state.

    Args:
        num_tasks: Number of tasks, K.
        base_epoch: Epoch whose mean losses are the base, counted from 0.
        sac_lr: Learning rate of the agent.
        buffer_size: Number of transitions that the agent stores.
        official: Use the log-density of the authors' code.
        seed: Seed of the agent. The state_dict contains the agent's whole state, as one uint8 tensor of fixed size.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Dai, Fei & Lu, "Improvable Gap Balancing for Multi-Task Learning", UAI 2023, with networks, schedule and reward of its
        code. Differs: the agent uses the log-density of u, where the code corrects for a tanh although it squashes with a
        softmax. Rewards are not multiplied by the ratio of initial and current learning rate. Training on an empty buffer
        is no error.
    """

    needs_epochs = True

    previous: Tensor
    action: Tensor
    steps: Tensor

    def __init__(
        self,
        num_tasks: int,
        base_epoch: int = 1,
        sac_lr: float = 3e-4,
        buffer_size: int = 10_000,
        official: bool = False,  # noqa: FBT001, FBT002 - options are given by name
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not sac_lr > 0:
            raise ValueError(f"sac_lr of 'igbv2' must be positive, but got {sac_lr}.")
        if buffer_size < 1:
            raise ValueError(f"buffer_size of 'igbv2' must be at least 1, but got {buffer_size}.")
        self.reference = BaseLosses(num_tasks, base_epoch, "igbv2")
        self.agent = Agent(num_tasks, sac_lr, buffer_size, seed, official=official)
        for name in ("previous", "action"):  # NaN before the first step
            self.register_buffer(name, torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu"))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, losses: Losses) -> WeightedLosses:
        """Return the weighted logarithms of the losses, after the agent has stored a transition, trained and acted.

        Args:
            losses: Positive values. Shape (K,).

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive.
        """
        L = values(losses).view_as(self.previous)  # a wrong number of losses fails here, before the agent changes
        require_above(L, 0, "igbv2", LOGARITHM, ADD_CONSTANT)
        base, before = values(self.reference.base), values(self.previous)
        if base.isfinite().all() and before.isfinite().all():
            self.agent.remember(before, values(self.action), reward(before, L, base), L)
        epoch = int(self.reference.epochs)
        if epoch >= FIRST_TRAINING_EPOCH and int(self.steps) % STEPS_BETWEEN_TRAININGS == 0:
            self.agent.train()
        action = self.agent.explore() if epoch < EXPLORATION_EPOCHS else self.agent.act(L)
        self.previous.copy_(L)
        self.action.copy_(action)
        self.steps += 1
        return weigh(losses.log(), action)

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Close an epoch with mean losses of shape (K,)."""
        self.reference.end_epoch(mean_losses)

    def get_extra_state(self) -> Tensor:
        """Return the state of the agent, for state_dict. Shape (n,), uint8."""
        return self.agent.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of the agent, as `get_extra_state` returns it."""
        self.agent.restore(state)


def reward(before: Tensor, after: Tensor, base: Tensor) -> float:
    """Return the smallest improvement of any task, relative to its base loss. Shapes (K,)."""
    return float(((before - after) / base).min())
