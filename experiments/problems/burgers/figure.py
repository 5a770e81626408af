"""A page of solutions: for each network the solution, its error, and three moments next to the exact solution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments.problems.burgers.solution import Array, solution

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from experiments.problems.base import Network

X, T = np.linspace(-1, 1, 201), np.linspace(0, 1, 101)
MOMENTS = {0.25: "#0072B2", 0.5: "#D55E00", 1.0: "#009E73"}
STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "axes.linewidth": 0.6}


def draw(networks: Sequence[tuple[str, Network]], file: Path) -> None:
    """Write a figure with a row for each network.

    Args:
        networks: Titles and networks.
        file: File to write; its ending is the format.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 1.9 * len(networks) + 0.2), layout="constrained")
        rows = figure.subplots(len(networks), 3, squeeze=False)
        for axes, (title, network) in zip(rows, networks, strict=True):
            draw_row(figure, axes, title, network)
        figure.savefig(file, dpi=110)


def draw_row(figure: Figure, axes: Sequence[Axes], title: str, network: Network) -> None:
    """Draw solution, error and moments of one network.

    Args:
        figure: The figure, for color bars.
        axes: Three axes.
        title: Title of the solution.
        network: The network.
    """
    x, t = np.meshgrid(X, T, indexing="ij")  # (201, 101)
    exact, values = solution(x.ravel(), t.ravel()).reshape(x.shape), values_of(network, x, t)
    relative = np.linalg.norm(values - exact) / np.linalg.norm(exact)
    shown = axes[0].pcolormesh(T, X, values, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    figure.colorbar(shown, ax=axes[0])
    axes[0].set(title=f"{title}: u", xlabel="t", ylabel="x")
    error = np.abs(values - exact).clip(1e-5)
    shown = axes[1].pcolormesh(T, X, error, cmap="magma", norm=LogNorm(1e-4, 1), rasterized=True)
    figure.colorbar(shown, ax=axes[1])
    axes[1].set(title=f"absolute error (relative L2 error {relative:.2g})", xlabel="t")
    for moment, color in MOMENTS.items():
        column = int(np.abs(T - moment).argmin())
        axes[2].plot(X, exact[:, column], color=color, linewidth=2.4, alpha=0.35)
        axes[2].plot(X, values[:, column], color=color, linewidth=0.9, label=f"t = {moment:g}")
    axes[2].set(title="thin: network, wide: exact", xlabel="x")
    axes[2].legend(fontsize=7, loc="upper right")


def values_of(network: Network, x: Array, t: Array) -> Array:
    """Return the solution of a network at places and times of any shape."""
    points = torch.tensor(np.stack([x.ravel(), t.ravel()], axis=1), dtype=torch.float32)
    with torch.no_grad():
        values: Array = network(points)["initial"].double().numpy().reshape(x.shape)
    return values
