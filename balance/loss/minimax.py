"""Self-adaptive weights: a game between the model, which lowers the weighted losses, and the weights, which raise them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..rules.registry import loss_balancers
from ._adam import Moments, register_moments
from ._checks import ADD_CONSTANT, of_tasks, require_above, set_of_tasks, values, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

Ascent = Literal["adam", "gradient"]


@loss_balancers.register(
    "minimax",
    label="SA-PINN",
    paper="McClenny & Braga-Neto 2020, https://arxiv.org/abs/2009.04544",
    remedies=("training pace",),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class Minimax(nn.Module):
    r"""Weights that climb the weighted sum of the losses, while the model descends it.

    .. math:: \min_\theta \max_w \sum_k w_k L_k(\theta)

    The gradient of the sum with respect to a weight is the loss. With ``ascent="gradient"`` a weight grows by ``lr`` times its
    loss at every update. With ``ascent="adam"`` it takes an Adam step, whose length is about ``lr`` at first, whatever the
    loss. A step uses the weights from before its own update. Weights never fall while losses are positive, so the effective
    learning rate grows with them. One task is weighted too. An absent task keeps its weight and its moments.

    Args:
        num_tasks: Number of tasks, K.
        lr: Learning rate of the weights, positive.
        ascent: Optimizer of the weights.
        every: Number of steps from one update of the weights to the next, at least 1.
        init: Initial weight of every task, positive.

    Raises:
        ValueError: If an option is out of range.

    Source:
        McClenny & Braga-Neto, "Self-Adaptive Physics-Informed Neural Networks", J. Comput. Phys. 2023, with one weight for
        each loss and the identity as mask, as in MiniMaxAdaptiveLoss of NeuralPDE.
        NeuralPDE has Adam with rate 1e-4 for equations and 0.5 for boundary conditions. A negative loss is an error,
        since weights could become negative.
    """

    stays_on_device = True

    weights: Tensor
    mean: Tensor
    mean_square: Tensor
    steps: Tensor
    calls: Tensor

    def __init__(self, num_tasks: int, lr: float = 0.005, ascent: Ascent = "adam", every: int = 1, init: float = 1.0) -> None:
        super().__init__()
        for name, number in (("lr", lr), ("init", init)):
            if not 0 < number < float("inf"):
                raise ValueError(f"{name} of 'minimax' must be positive, but got {number}.")
        if every < 1:
            raise ValueError(f"every of 'minimax' must be at least 1, but got {every}.")
        self.lr, self.ascent, self.every = lr, ascent, every
        self.register_buffer("weights", torch.full((num_tasks,), float(init), dtype=torch.float64, device="cpu"))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device="cpu"))  # steps so far
        register_moments(self, num_tasks)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights, and then update the weights.

        Args:
            losses: Values of the present tasks, not negative. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is negative.
        """
        L = values(losses)
        require_above(torch.where(L == 0, 1.0, L), 0, "minimax", "multiplies it by a weight that grows with it", ADD_CONSTANT)
        weighted = weigh(losses, of_tasks(self.weights, present).clone())  # a copy, since the weights climb below
        if int(self.calls) % self.every == 0:
            self._climb(present, L.to(self.weights))
        self.calls += 1
        return weighted

    def _climb(self, present: Tensor | None, losses: Tensor) -> None:
        if self.ascent == "gradient":
            set_of_tasks(self.weights, present, of_tasks(self.weights, present) + self.lr * losses)
        else:
            Moments(self.mean, self.mean_square, self.steps).step(self.weights, present, -losses, self.lr)
