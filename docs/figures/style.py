"""Colours, names and directions that the figures of the documentation share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from balance import Balancer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

# A palette that people with any common form of colour blindness can tell apart, by Okabe and Ito
COLOURS = {
    "ls": "#000000",
    "mean": "#000000",
    "mgda": "#0072B2",
    "pcgrad": "#E69F00",
    "upgrad": "#D55E00",
    "imtl": "#009E73",
    "scaleinvls": "#CC79A7",
}
LABELS = {
    "ls": "equal weights",
    "mean": "mean",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "upgrad": "UPGrad",
    "imtl": "IMTL-G",
    "scaleinvls": "SI, a loss balancer",
}
CONE = "#CFE3F1"


def direction_of(jacobian: Tensor, gradient: str, scale: str = "paper") -> Tensor:
    """Return the direction of a gradient balancer, computed by a step of the library.

    Args:
        jacobian: Rows are the task gradients. Shape (K, P).
        gradient: Name of the gradient balancer.
        scale: Length of the direction, as in `balance.Balancer`.

    Returns:
        Shape (P,).
    """
    theta = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype, requires_grad=True)
    balancer = Balancer(len(jacobian), gradient=gradient, scale=scale)
    balancer.backward(jacobian @ theta + 1, shared=[theta])
    return theta.grad


def plane_gradient(degrees: float, length: float) -> list[float]:
    """Return a gradient in the plane, given its angle to the first axis and its length."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return [length * float(angle.cos()), length * float(angle.sin())]


def arrow(axes: Axes, tip: Tensor, **options: object) -> None:
    """Draw an arrow from the origin."""
    axes.quiver(0, 0, float(tip[0]), float(tip[1]), angles="xy", scale_units="xy", scale=1, **options)
