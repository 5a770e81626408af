r"""The two losses over the plane of parameters (a, b), their derivatives in closed form, and the Pareto set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import elementwise

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]

TASKS = ("f1", "f2")
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of the first loss
LOWER_BOUND = -21.0  # of the second loss, and of the first divided by its scale
_FLOOR = 5e-6  # of what logarithms are taken of


def losses(points: Tensor) -> dict[str, Tensor]:
    r"""The two losses, the first without its scale.

    .. math::
        L_1 = f_1 c_1 + g_1 c_2, \quad L_2 = f_2 c_1 + g_2 c_2, \qquad
        c_1 = \max(\tanh(b/2), 0), \quad c_2 = \max(\tanh(-b/2), 0)

        f_1 = \log \max(|\tfrac12(-a - 7) - \tanh(-b)|, 5 \cdot 10^{-6}) + 6, \quad
        f_2 = \log \max(|\tfrac12(-a + 3) + \tanh(-b) + 2|, 5 \cdot 10^{-6}) + 6

        g_{1,2} = \bigl((-a \pm 7)^2 + 0.1 (-b - 8)^2\bigr) / 10 - 20

    A maximum has derivative 1 where its two sides are equal. So both tasks pull at b = 0, where with 0 nothing would ever move.

    Args:
        points: Shape (..., 2).

    Returns:
        By task. Shape (...), each above `LOWER_BOUND`.

    Source:
        Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, appendix, after Liu et al., "Conflict-Averse
        Gradient Descent", NeurIPS 2021. Differs from the printed formula, and agrees with the published codes, in the sign of
        :math:`\tanh(-b)` in :math:`f_2`: with the printed one the start (9, 9) has no way to the Pareto front.
    """
    a, b = points.unbind(dim=-1)
    upper, lower = (b / 2).tanh().clamp(min=0), (-b / 2).tanh().clamp(min=0)
    f1 = (0.5 * (-a - 7) - (-b).tanh()).abs().clamp(min=_FLOOR).log() + 6
    f2 = (0.5 * (-a + 3) + (-b).tanh() + 2).abs().clamp(min=_FLOOR).log() + 6
    bowls = [((-a + middle) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20 for middle in (7, -7)]
    return {"f1": f1 * upper + bowls[0] * lower, "f2": f2 * upper + bowls[1] * lower}


def values_and_gradients(points: Array, scale: float = SCALE) -> tuple[Array, Array]:
    """The two losses and their gradients at many points, without autograd.

    Args:
        points: Shape (2, S): a and b.
        scale: Of the first loss.

    Returns:
        Losses (2, S) by task, and gradients (2, 2, S) by task and coordinate.
    """
    a, b = points
    half, whole = np.tanh(0.5 * b), np.tanh(b)
    gates = np.maximum([half, -half], 0)  # (2, S): of the logarithms and of the bowls
    slope = 0.5 * (1 - half * half)
    gate_slopes = np.array([slope * (b >= 0), -slope * (b <= 0)])
    inside = np.array([-0.5 * (a + 7) + whole, -0.5 * (a - 7) - whole])  # of f1 and f2
    size = np.abs(inside)
    logs = np.log(np.maximum(size, _FLOOR)) + 6
    away = np.array([a - 7, a + 7])  # from the middles of the bowls
    down = b + 8
    bowls = 0.1 * away * away + (0.01 * down * down - 20)
    inverse = np.divide(1, inside, out=np.zeros_like(inside), where=size >= _FLOOR)
    tilt = 1 - whole * whole
    factors = np.array([[scale], [1.0]])
    values = factors * (logs * gates[0] + bowls * gates[1])
    gradients = np.empty((2, 2, points.shape[1]))
    gradients[:, 0] = factors * (-0.5 * inverse * gates[0] + 0.2 * away * gates[1])
    signs = np.array([[1.0], [-1.0]])
    gradients[:, 1] = factors * (
        signs * tilt * inverse * gates[0] + logs * gate_slopes[0] + 0.02 * down * gates[1] + bowls * gate_slopes[1]
    )
    return values, gradients


def values(points: Array, scale: float = SCALE) -> Array:
    """The two losses. Shape (..., 2) -> (..., 2)."""
    found = losses(torch.from_numpy(np.ascontiguousarray(points)))
    return np.stack([scale * found["f1"].numpy(), found["f2"].numpy()], axis=-1)


def pareto_set(count: int = 1000) -> Array:
    """Points from which no step improves both losses: between the two minima the gradients point in opposite directions.

    They do not depend on the scale of the first loss.

    Args:
        count: Number of points, with equal steps in a from -7, where the second loss is least, to 7.

    Returns:
        Shape (count, 2). b is -8.355 in the middle, where published figures have it everywhere, and -8.434 at the ends.
    """
    a = np.linspace(-7, 7, count)

    def turn(b: Array, a: Array) -> Array:
        _, gradients = values_and_gradients(np.stack([a, b]))
        (x1, y1), (x2, y2) = gradients
        product: Array = x1 * y2 - y1 * x2
        return product

    found = elementwise.find_root(turn, (np.full(count, -8.6), np.full(count, -8.2)), args=(a,))
    assert found.success.all()
    return np.stack([a, found.x], axis=1)
