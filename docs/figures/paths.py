"""Paths of five methods to the Pareto set of two losses, the first of which is ten times as large."""

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from style import COLOURS, LABELS
from torch import Tensor

from balance import Balancer

METHODS = {  # loss balancer, gradient balancer, marker of the last point
    "ls": ("ls", None, "s"),
    "scaleinvls": ("scaleinvls", None, "D"),
    "pcgrad": ("ls", "pcgrad", "^"),
    "imtl": ("ls", "imtl", "P"),
    "mgda": ("ls", "mgda", "o"),
}
START, STEPS, RATE = (-1.9, 1.9), 600, 0.02


def losses(point: Tensor) -> Tensor:
    """Return two losses of points in the plane. Shape (..., 2) -> (2, ...)."""
    a, b = point.unbind(-1)
    first = 1 + ((a + 1) ** 2 + 4 * b**2) / 2
    second = 1 + ((a - 1) ** 2 + 2 * (b - 1) ** 2) / 2
    return torch.stack([10 * first, second])


def path(loss: str, gradient: str | None) -> np.ndarray:
    """Return the points of a descent without momentum, whose steps have the scale of the summed gradient."""
    point = torch.tensor(START, requires_grad=True)
    balancer = Balancer(2, loss=loss, gradient=gradient, scale="sum" if gradient else "paper")
    optimizer = torch.optim.SGD([point], lr=RATE)
    points = [START]
    for _ in range(STEPS):
        optimizer.zero_grad()
        balancer.backward(losses(point), shared=[point])
        optimizer.step()
        points.append(tuple(point.tolist()))
    return np.array(points)


def pareto_set() -> np.ndarray:
    """Return the minima of all weighted sums of the two losses. Shape (n, 2)."""
    t = np.linspace(0, 1, 200)
    return np.stack([2 * t - 1, t / (2 * (1 - t) + t)], axis=1)


figure, axes = plt.subplots(figsize=(7.2, 3.3), layout="compressed")
grid = torch.stack(torch.meshgrid(torch.linspace(-2.3, 1.9, 120), torch.linspace(-0.5, 2.2, 90), indexing="xy"), dim=-1)
first, second = losses(grid).numpy()
axes.contour(grid[..., 0], grid[..., 1], first, levels=[12, 16, 25, 45, 80], colors="#56B4E9", linewidths=0.7)
axes.contour(
    grid[..., 0], grid[..., 1], second, levels=[1.2, 1.6, 2.5, 5, 10], colors="#999999", linewidths=0.7, linestyles="--"
)
front = pareto_set()
axes.plot(front[:, 0], front[:, 1], color="#BBBBBB", linewidth=6, solid_capstyle="round", zorder=1)
for name, (loss, gradient, marker) in METHODS.items():
    points = path(loss, gradient)
    axes.plot(points[:, 0], points[:, 1], color=COLOURS[name], linewidth=1.8, zorder=2)
    axes.plot(*points[-1], marker, color=COLOURS[name], markersize=8, markeredgecolor="white", zorder=3)
axes.plot(*START, "x", color="#000000", markersize=8, zorder=3)
axes.set(xlabel="parameter 1", ylabel="parameter 2", aspect="equal")
handles = [Line2D([], [], color=COLOURS[name], marker=marker, label=LABELS[name]) for name, (_, _, marker) in METHODS.items()]
handles += [
    Line2D([], [], color="#BBBBBB", linewidth=6, label="Pareto set"),
    Line2D([], [], color="#56B4E9", linewidth=1, label="loss 1, ten times as large"),
    Line2D([], [], color="#999999", linewidth=1, linestyle="--", label="loss 2"),
    Line2D([], [], color="#000000", marker="x", linestyle="", label="start"),
]
figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
