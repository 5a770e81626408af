r"""The two losses over the plane of parameters (a, b), and their Pareto set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import elementwise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Array = NDArray[np.float64]

TASKS = ("f1", "f2")
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of the first loss
LOWER_BOUND = -21.0  # of the second loss, and of the first loss divided by its scale
_FLOOR = 5e-6  # least argument of the logarithms


def losses(points: Tensor) -> dict[str, Tensor]:
    r"""Return the two losses, the first without its scale.

    .. math::
        L_1 = f_1 c_1 + g_1 c_2, \quad L_2 = f_2 c_1 + g_2 c_2, \qquad
        c_1 = \max(\tanh(b/2), 0), \quad c_2 = \max(\tanh(-b/2), 0)

        f_1 = \log \max(|\tfrac12(-a - 7) - \tanh(-b)|, 5 \cdot 10^{-6}) + 6, \quad
        f_2 = \log \max(|\tfrac12(-a + 3) + \tanh(-b) + 2|, 5 \cdot 10^{-6}) + 6

        g_{1,2} = \bigl((-a \pm 7)^2 + 0.1 (-b - 8)^2\bigr) / 10 - 20

    A maximum has derivative 1 where its two sides are equal. So both tasks have a gradient at b = 0; with derivative 0 the
    second start would never move.

    Args:
        points: Shape (..., 2).

    Returns:
        Losses by task, each above `LOWER_BOUND`. Shape (...).

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


def above_bounds(raw: Mapping[str, Tensor], scale: float | Tensor) -> dict[str, Tensor]:
    """Return the losses as a balancer gets them: above zero, which several rules require, and the first times its scale."""
    return {"f1": scale * (raw["f1"] - LOWER_BOUND), "f2": raw["f2"] - LOWER_BOUND}


def values(points: Array, scale: float = SCALE) -> Array:
    """Return the two losses. Both have shape (..., 2)."""
    raw = losses(torch.from_numpy(np.ascontiguousarray(points)))
    return np.stack([scale * raw["f1"].numpy(), raw["f2"].numpy()], axis=-1)


def gradients(points: Array) -> Array:
    """Return the gradients of the two losses, the first without its scale. Shapes (..., 2) to (2, ..., 2)."""
    inputs = torch.from_numpy(np.ascontiguousarray(points)).requires_grad_()
    totals = [loss.sum() for loss in losses(inputs).values()]  # every loss depends only on one point
    return np.stack([torch.autograd.grad(total, inputs, retain_graph=True)[0].numpy() for total in totals])


def pareto_set(count: int = 1000) -> Array:
    """Return points from which no step improves both losses: the gradients point in opposite directions there.

    The points lie between the two minima and do not depend on the scale of the first loss.

    Args:
        count: Number of points, with equal steps in a from -7, where the second loss is least, to 7.

    Returns:
        Shape (count, 2). b is -8.355 in the middle, where published figures have it everywhere, and -8.434 at the ends.
    """
    a = np.linspace(-7, 7, count)

    def turn(b: Array, a: Array) -> Array:
        (x1, y1), (x2, y2) = np.moveaxis(gradients(np.stack([a, b], axis=-1)), -1, 1)
        product: Array = x1 * y2 - y1 * x2
        return product

    root = elementwise.find_root(turn, (np.full(count, -8.6), np.full(count, -8.2)), args=(a,))
    assert root.success.all()
    return np.stack([a, root.x], axis=1)
