"""Weights from the pace at which the losses change: softadapt, relobralo, resnorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..rules.checks import beside
from ..rules.generator import SeededGenerator
from ..rules.registry import loss_balancers
from ._adam import Moments, register_moments
from ._checks import ADD_CONSTANT, DIVISION, of_tasks, require_above, set_of_tasks, softmax, values, weigh

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Losses, WeightedLosses

Variant = Literal["plain", "normalized", "loss_weighted"]
Point = Literal["newest", "oldest"]

ROUNDING = 1e-12  # relative size of a difference that rounding explains


@loss_balancers.register(
    "softadapt",
    label="SoftAdapt",
    paper="Heydari et al. 2019, https://arxiv.org/abs/1912.12355",
    remedies=("training pace",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class SoftAdapt(nn.Module):
    r"""Larger weights for losses that rise, or fall slowly, over the last few steps.

    .. math:: w = \operatorname{softmax}(\beta s)

    with the slope s of each loss over its last ``window`` losses, the current loss included. The slope is a finite difference
    of accuracy order ``window - 1``, per step. Variants:

    * ``"normalized"``: :math:`s / \sum_j |s_j|` in place of s, so that the unit of the losses does not matter.
    * ``"loss_weighted"``: :math:`w_k \propto \bar L_k e^{\beta s_k}` with the mean :math:`\bar L` of the same losses.

    Weights are positive and sum to one. Until a task has ``window`` losses its slope is zero, so that all weights are equal
    at first (loss_weighted: proportional to the losses). One task has weight 1. Absent tasks take no part and keep their
    losses; a slope then counts only the steps at which the task was present.

    Args:
        num_tasks: Number of tasks, K.
        beta: β; positive: weight for losses that fall slowly, negative: weight for losses that fall fast.
        variant: The formula.
        window: Number of losses in a slope, at least 2. Large windows amplify the noise of mini-batches.
        point: Point of the window at which the slope is taken: ``"newest"``, or ``"oldest"`` as in the authors' code. With
            ``window=2`` both are the difference of the last two losses.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Heydari, Thompson & Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with Multi-Part Loss
        Functions", 2019, with β = 0.1. Differs from the code: the slopes are normalised by the sum of their absolute values,
        where the code's last version divides by the plain sum, which can be zero or negative. No 1e-8 is added to a
        denominator.
    """

    stays_on_device = True

    history: Tensor

    def __init__(
        self, num_tasks: int, beta: float = 0.1, variant: Variant = "plain", window: int = 2, point: Point = "newest"
    ) -> None:
        super().__init__()
        if not abs(beta) < float("inf"):
            raise ValueError(f"beta of 'softadapt' must be a finite number, but got {beta}.")
        if window < 2:
            raise ValueError(f"window of 'softadapt' must be at least 2, but got {window}.")
        self.beta, self.variant = beta, variant
        self.coefficients = slope_coefficients(window, point)
        # oldest row first; NaN until a task has that row
        self.register_buffer("history", torch.full((window, num_tasks), torch.nan, dtype=torch.float64, device="cpu"))

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights, and store the losses.

        Args:
            losses: Finite values of the present tasks, positive with ``variant="loss_weighted"``. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive and weights are proportional to it.
        """
        L = values(losses)
        if self.variant == "loss_weighted":
            require_above(L, 0, "softadapt", "weighs in proportion to it", ADD_CONSTANT)
        history = torch.cat([values(of_tasks(self.history[1:], present)), L[None]])
        weighted = weigh(losses, self._logits(history).softmax(dim=0))
        set_of_tasks(self.history, present, history)
        return weighted

    def _logits(self, history: Tensor) -> Tensor:
        """Return the logarithms of the weights, up to a constant, given losses of shape (window, K). Shape (K,)."""
        coefficients = beside(self.coefficients, history)
        slopes = (coefficients @ history).nan_to_num(nan=0.0)
        scale = (coefficients.abs() @ history.abs()).nan_to_num(nan=0.0)
        slopes = torch.where(slopes.abs() > ROUNDING * scale, slopes, 0.0)
        if self.variant == "normalized":
            slopes = (slopes / slopes.abs().sum()).nan_to_num(nan=0.0)  # all slopes can be zero
        logits = self.beta * slopes
        return logits + history.nanmean(dim=0).log() if self.variant == "loss_weighted" else logits


def slope_coefficients(window: int, point: Point) -> Tensor:
    """Return the coefficients of a first derivative on an equidistant grid, exact for polynomials of degree window - 1.

    Args:
        window: Number of points, at least 2.
        point: The point at which the derivative is taken.

    Returns:
        Coefficients of the values, the oldest first. Shape (window,), float64.
    """
    # d/dx of the Lagrange polynomials at the last point, in closed form: binomials over distances
    coefficients = [0.0] * window
    binomial = 1.0
    for distance in range(1, window):
        binomial *= (window - distance) / distance
        coefficients[window - 1 - distance] = (-1) ** distance * binomial / distance
    coefficients[-1] = -sum(coefficients)
    newest = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
    return newest if point == "newest" else -newest.flip(0)


@loss_balancers.register(
    "relobralo",
    label="ReLoBRaLo",
    paper="Bischof & Kraus 2021, https://arxiv.org/abs/2110.09813",
    remedies=("loss scale", "training pace"),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class ReLoBRaLo(nn.Module):
    r"""Relative loss balancing with random lookback: larger weights for losses that have fallen little.

    .. math:: w(t) = \alpha \bigl( \rho_t w(t-1) + (1 - \rho_t) \hat w(t, 0) \bigr) + (1 - \alpha) \hat w(t, t-1),
        \qquad \hat w(t, t') = K \operatorname{softmax}\bigl( L(t) / (T L(t')) \bigr)

    with the first losses L(0), and ρ drawn at each step: 1 with probability ``rho``, else 0. So the weights forget their
    history now and then, and look back at the beginning. They do not change when a loss is multiplied by a constant. They are
    positive, start at 1, and sum to K if all tasks are always present. One task has weight 1.

    Absent tasks take no part and keep their losses and weights. A task begins at its first step, with weight 1.

    Args:
        num_tasks: Number of tasks, K.
        alpha: α in 0..1: share of the past.
        temperature: T > 0; the larger, the more equal the weights.
        rho: Probability in 0..1 that the past is the last weights, not the comparison with the first losses.
        seed: Seed of the draws; the generator is saved in the state_dict.

    Raises:
        ValueError: If an option is out of range.

    Source:
        Bischof & Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", 2021, with α and T as in the
        authors' code. Differs: one draw for all tasks, from a separate generator. The weights of the first step are 1. No 1e-8
        is added to a denominator, so that a loss of zero is an error.
    """

    stays_on_device = True

    first: Tensor
    previous: Tensor
    weights: Tensor

    def __init__(
        self, num_tasks: int, alpha: float = 0.999, temperature: float = 1.0, rho: float = 0.999, seed: int = 0
    ) -> None:
        super().__init__()
        for name, share in (("alpha", alpha), ("rho", rho)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} of 'relobralo' must be in 0..1, but got {share}.")
        if not temperature > 0:
            raise ValueError(f"temperature of 'relobralo' must be positive, but got {temperature}.")
        self.alpha, self.temperature, self.rho = alpha, temperature, rho
        self.random = SeededGenerator(seed)
        for name in ("first", "previous"):  # NaN until a task has been present
            self.register_buffer(name, torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu"))
        self.register_buffer("weights", torch.ones(num_tasks, dtype=torch.float64, device="cpu"))

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights, after these have been updated.

        Args:
            losses: Positive values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive.
        """
        L = values(losses)
        require_above(L, 0, "relobralo", DIVISION, ADD_CONSTANT)
        first, previous = (_filled(values(of_tasks(buffer, present)), L) for buffer in (self.first, self.previous))
        past = values(of_tasks(self.weights, present))
        if float(self.random.uniform(1)) >= self.rho:
            past = self._compared(L, first)
        weights = self.alpha * past + (1 - self.alpha) * self._compared(L, previous)
        weighted = weigh(losses, weights)
        for buffer, state in ((self.first, first), (self.previous, L), (self.weights, weights)):
            set_of_tasks(buffer, present, state)
        return weighted

    def _compared(self, losses: Tensor, earlier: Tensor) -> Tensor:
        """Return weights from the comparison with earlier losses; they sum to K. Shapes (K,)."""
        return len(losses) * softmax(losses / earlier, self.temperature)


@loss_balancers.register(
    "resnorm",
    label="ResNorm",
    paper="NVIDIA PhysicsNeMo Sym 2023, https://github.com/NVIDIA/physicsnemo-sym",
    remedies=("loss scale", "training pace"),
    needs=("positive losses",),
    invariances=("loss_permutation_equivariant", "separable"),
)
class ResidualNormalization(nn.Module):
    r"""Residual normalisation: GradNorm with losses in place of gradient lengths, so that one backward pass suffices.

    The weights are :math:`w = K \operatorname{softmax}(\xi)`. After each step ξ takes one Adam step down the gradient of

    .. math:: \sum_k \bigl| e^{\xi_k} L_k - \bar L r_k^\alpha \bigr|, \qquad
        r_k = \frac{L_k / L_k(0)}{\frac1K \sum_j L_j / L_j(0)}

    at :math:`e^\xi = w`, with the mean :math:`\bar L` of the losses and the first losses L(0). So every
    weighted loss is drawn towards the mean loss, and towards a larger value if it has fallen little. Since the weights sum to
    K, not all can reach it. Weights are positive and start at 1. One task has weight 1. Absent tasks take no part and keep
    their state.

    Args:
        num_tasks: Number of tasks, K.
        alpha: α ≥ 0: strength of the correction of the training pace.
        lr: Learning rate of ξ, positive.

    Raises:
        ValueError: If an option is out of range.

    Source:
        The aggregator ResNorm of NVIDIA PhysicsNeMo Sym (contributors Nandi, Van Essendelft, Nabian), with α = 1. Differs: ξ
        has its own Adam, where the code trains it with the user's optimizer. A difference that rounding explains counts as
        zero.
    """

    stays_on_device = True

    logits: Tensor
    first: Tensor
    mean: Tensor
    mean_square: Tensor
    steps: Tensor

    def __init__(self, num_tasks: int, alpha: float = 1.0, lr: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha of 'resnorm' must be a finite number, not negative, but got {alpha}.")
        if not lr > 0:
            raise ValueError(f"lr of 'resnorm' must be positive, but got {lr}.")
        self.alpha, self.lr = alpha, lr
        self.register_buffer("logits", torch.zeros(num_tasks, dtype=torch.float64, device="cpu"))
        self.register_buffer("first", torch.full((num_tasks,), torch.nan, dtype=torch.float64, device="cpu"))
        register_moments(self, num_tasks)

    def forward(self, losses: Losses, present: Tensor | None = None) -> WeightedLosses:
        """Multiply the losses by the weights, and then update the weights.

        Args:
            losses: Positive values of the present tasks. Shape (K,).
            present: Indices of those tasks; None for all.

        Returns:
            Shape (K,).

        Raises:
            TaskError: If a loss is not positive.
        """
        L = values(losses)
        require_above(L, 0, "resnorm", DIVISION, ADD_CONSTANT)
        first = _filled(values(of_tasks(self.first, present)), L)
        weights = len(L) * values(of_tasks(self.logits, present)).softmax(dim=0)
        weighted = weigh(losses, weights)
        pace = L / first
        target = L.mean() * (pace / pace.mean()) ** self.alpha
        surplus = weights * L - target
        sign = torch.where(surplus.abs() > ROUNDING * target, surplus.sign(), 0.0)
        moments = Moments(self.mean, self.mean_square, self.steps)
        moments.step(self.logits, present, (sign * weights * L).to(self.logits), self.lr)
        set_of_tasks(self.first, present, first)
        return weighted


def _filled(buffer: Tensor, losses: Tensor) -> Tensor:
    """Return earlier losses, and the current loss of a task without one. Shapes (K,), (K,) -> (K,)."""
    return torch.where(buffer.isnan(), losses, buffer)
