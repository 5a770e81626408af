"""Dynamic weight average: larger weights for losses that fall slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..rules.registry import loss_balancers
from ._checks import ADD_CONSTANT, DIVISION, of_tasks, require_above, set_of_tasks, values, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

Mode = Literal["epoch", "window"]


@loss_balancers.register(
    "dwa",
    label="DWA",
    paper="Liu et al. 2019, https://arxiv.org/abs/1803.10704",
    remedies=("training pace",),
    needs=("positive losses", "end_epoch"),
    invariances=("loss_permutation_equivariant", "separable"),
)
class DynamicWeightAverage(nn.Module):
    r"""Larger weights for tasks whose loss falls more slowly.

    .. math:: \lambda = K \operatorname{softmax}(r / T), \qquad r_k = \bar L_k(t-1) / \bar L_k(t-2)

    with the mean losses of the two previous epochs. Weights sum to K. They do not change when a loss is multiplied by a
    constant. A task counts as steady (r = 1) until both of its means exist, so all weights are 1 at first. Absent tasks
    take no part in the softmax.

    Args:
        num_tasks: Number of tasks, K.
        temperature: T > 0; the larger, the more equal the weights.
        mode: ``"epoch"``: means over epochs, which `end_epoch` closes. ``"window"``: means over the last ``window``
            steps, with the current step, and over the ``window`` steps before them.
        window: Steps in each window, at least 1.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, eq. (7). The mode ``"window"`` is
        from Nash-MTL's code. Differs from that code: weights stay 1 until both windows are full, where the code counts
        placeholders of one as losses. Weights sum to K as in the paper, not to 1.
    """

    stays_on_device = True

    history: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0, mode: Mode = "epoch", window: int = 25) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature of 'dwa' must be positive, but got {temperature}.")
        if window < 1:
            raise ValueError(f"window of 'dwa' must be at least 1, but got {window}.")
        self.temperature = temperature
        self.mode = mode
        self.needs_epochs = mode == "epoch"
        rows = 2 if mode == "epoch" else 2 * window
        # oldest row first; NaN until a task has that row
        self.register_buffer("history", torch.full((rows, num_tasks), torch.nan, dtype=torch.float64, device="cpu"))

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights; in window mode, also store the losses.

        Args:
            losses: Finite values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If the older mean of a loss is not positive.
        """
        history = of_tasks(self.history, present)
        if self.mode == "window":
            history = torch.cat([history[1:], values(losses).to(history)[None]])
        old, new = values(history).chunk(2)
        weights = len(losses) * (_ratio(new.mean(dim=0), old.mean(dim=0)) / self.temperature).softmax(dim=0)
        weighted = weigh(losses, weights)
        if self.mode == "window":
            set_of_tasks(self.history, present, history)
        return weighted

    def end_epoch(self, mean_losses: Tensor) -> None:
        """Close an epoch.

        Args:
            mean_losses: Mean raw loss of every task over the epoch, NaN for a task that was never present. Shape (K,).
        """
        if self.mode == "epoch":
            means = mean_losses.to(self.history)
            rows = torch.stack([self.history[1], means])
            self.history.copy_(torch.where(means.isfinite(), rows, self.history))


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    """Return new / old, 1 where a mean does not exist yet. Shapes (K,), (K,) -> (K,)."""
    known = old.isfinite() & new.isfinite()
    require_above(torch.where(known, old, 1.0), 0, "dwa", DIVISION, ADD_CONSTANT, quantity="Mean loss")
    return torch.where(known, new / old, 1.0)
