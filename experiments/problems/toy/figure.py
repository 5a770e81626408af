"""A page of trajectories: the landscape, then for each method the plane of the losses above the plane of the parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context, ticker
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from experiments.problems.toy.landscape import SCALE, Array, pareto_set, values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.gridspec import GridSpec, SubplotSpec

WIDTH = 7.0  # inches
ABREAST = 4
POINTS = 500  # drawn points of a trajectory; more are not visible
EXTENT = 11  # of the plane of the parameters, to each side
TITLES = {
    "ls": "LS",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "imtl": "IMTL-G",
    "nashmtl": "Nash-MTL",
    "graddrop": "GradDrop",
    "famo": "FAMO",
    "go4align": "GO4Align",
}
TIME = LinearSegmentedColormap.from_list("time", colormaps["plasma"](np.linspace(0, 0.78, 64)))
GROUND = LinearSegmentedColormap.from_list("ground", ["#C3CBD3", "#FFFFFF"])  # low is dark
FRONT = "#009E73"
GREY = "#6B6B6B"
STYLE: Any = {  # Any, since matplotlib 3.11 lists all keys in the type and earlier ones do not
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "font.size": 8,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "xtick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 8,
    "ytick.major.width": 0.6,
}


class Ground(NamedTuple):
    """The losses over the plane of the parameters. Shape (N, N) each."""

    a: Array
    b: Array
    first: Array
    second: Array
    mean: Array


def reached_front(points: Array) -> Array:
    """Return whether points lie on the Pareto set, to 0.1 in b. Shape (S, 2) -> (S,)."""
    front = pareto_set()
    on: Array = (np.abs(points[:, 0]) <= 7.05) & (np.abs(points[:, 1] - np.interp(points[:, 0], *front.T)) < 0.1)
    return on


@rc_context(STYLE)
def draw(trajectories: Mapping[str, Array], scale: float = SCALE) -> Figure:
    """Draw the page.

    Args:
        trajectories: By method, points before every step and after the last. Shape (steps + 1, S, 2).
        scale: Scale of the first loss.

    Returns:
        The page.
    """
    blocks = math.ceil(len(trajectories) / ABREAST)
    rows = 1 + 2 * blocks
    figure = Figure(figsize=(WIDTH, 0.3 + 1.72 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)  # type: ignore[union-attr, call-arg]
    grid = figure.add_gridspec(rows, ABREAST)
    steps = max(len(path) for path in trajectories.values()) - 1
    time = PowerNorm(0.5, 0, steps)  # the points move fastest at the beginning
    ground = _ground(scale)
    _draw_landscape(figure, grid, ground)
    _draw_key(figure, grid[0, ABREAST - 1], time)
    planes = {method: values(path, scale) for method, path in trajectories.items()}
    limits = _limits(np.concatenate([plane.reshape(-1, 2) for plane in planes.values()]))
    for k, (method, path) in enumerate(trajectories.items()):
        block, column = divmod(k, ABREAST)
        above = figure.add_subplot(grid[1 + 2 * block, column])
        above.set_title("+".join(TITLES.get(part, part) for part in method.split("+")), fontweight="bold")
        above.set(xlim=limits[0], ylim=limits[1])
        _draw_losses(above, planes[method], path, time, scale, first=column == 0)
        _draw_parameters(figure.add_subplot(grid[2 + 2 * block, column]), ground, path, time, first=column == 0)
    return figure


def _ground(scale: float) -> Ground:
    side = np.linspace(-EXTENT, EXTENT, 301)
    a, b = np.meshgrid(side, side)
    heights = values(np.stack([a, b], axis=-1), scale)
    return Ground(a, b, heights[..., 0], heights[..., 1], heights.mean(axis=-1))


def _draw_landscape(figure: Figure, grid: GridSpec, ground: Ground) -> None:
    """Draw the first row: each loss and their mean, with the minimum."""
    for k, (title, height) in enumerate(zip(("$L_1$", "$L_2$", "$(L_1 + L_2) / 2$"), ground[2:], strict=True)):
        axes = figure.add_subplot(grid[0, k])
        _draw_ground(axes, ground, height, labels=True)
        lowest = np.unravel_index(height.argmin(), height.shape)
        axes.plot(ground.a[lowest], ground.b[lowest], "*", color=FRONT, markersize=9, mec="white", mew=0.6, zorder=4)
        axes.set_title(title, parse_math=True)
        _label_parameters(axes, first=k == 0)


def _draw_losses(axes: Axes, plane: Array, path: Array, time: PowerNorm, scale: float, *, first: bool) -> None:
    """Draw trajectories in the plane of the losses."""
    axes.plot(*values(pareto_set(), scale).T, color=FRONT, linewidth=4, alpha=0.45, solid_capstyle="round", zorder=1)
    _draw_paths(axes, plane, path, time)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
    _label(axes, "$L_1$", "$L_2$", first=first)


def _draw_parameters(axes: Axes, ground: Ground, path: Array, time: PowerNorm, *, first: bool) -> None:
    """Draw trajectories in the plane of the parameters, on the mean of the losses."""
    _draw_ground(axes, ground, ground.mean)
    axes.plot(*pareto_set().T, color=FRONT, linewidth=4, alpha=0.45, solid_capstyle="round", zorder=1)
    _draw_paths(axes, path, path, time)
    _label_parameters(axes, first=first)


def _draw_ground(axes: Axes, ground: Ground, height: Array, *, labels: bool = False) -> None:
    levels = ticker.MaxNLocator(12).tick_values(float(height.min()), float(height.max()))
    axes.contourf(ground.a, ground.b, height, levels, cmap=GROUND, zorder=0)
    lines = axes.contour(ground.a, ground.b, height, levels, colors="#8A96A3", linewidths=0.35, linestyles="solid", zorder=0.5)
    if labels:
        lowest = ground.a.flat[height.argmin()]
        spots = [(lowest + shift, -5) for shift in (-14, -11, -7, 7, 11, 14)] + [(0, 6)]
        spots = [(x, y) for x, y in spots if abs(x) < EXTENT - 1]
        axes.clabel(lines, manual=spots, fmt=lambda level: f"{level:g}", fontsize=5.5, colors="#3C4650", inline_spacing=2)
    axes.grid(visible=False)
    axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal")


def _draw_paths(axes: Axes, shown: Array, points: Array, time: PowerNorm) -> None:
    """Draw trajectories in one of the planes, coloured by the step.

    Args:
        axes: Axes of that plane.
        shown: The trajectories in that plane. Shape (steps + 1, S, 2).
        points: The trajectories in the plane of the parameters. Shape (steps + 1, S, 2).
        time: Scale of the steps.
    """
    last = len(shown) - 1
    steps = np.unique(np.linspace(0, last, min(POINTS, last) + 1).round().astype(int))
    on_front = reached_front(points[-1])
    rim = [withStroke(linewidth=1.6, foreground="white")]
    for k in range(shown.shape[1]):
        line = shown[steps, k]
        pieces = np.stack([line[:-1], line[1:]], axis=1)
        axes.add_collection(
            LineCollection(list(pieces), array=steps[:-1], cmap=TIME, norm=time, linewidths=1.1, capstyle="round", zorder=2)
        )
        axes.plot(*line[0], "o", color="black", markersize=3.4, mec="white", mew=0.5, zorder=3)
        axes.annotate(str(k + 1), line[0], (3, 2), textcoords="offset points", fontsize=6.5, zorder=5, path_effects=rim)
        axes.plot(*line[-1], **_end(on_front=bool(on_front[k])), zorder=4)


def _end(*, on_front: bool) -> dict[str, Any]:
    """Return the mark of the end of a trajectory."""
    kind = (
        {"marker": "D", "color": "#E69F00", "markersize": 4.6}
        if on_front
        else {"marker": "X", "color": "black", "markersize": 6.5}
    )
    return {"mec": "white", "mew": 0.6, "linestyle": "none"} | kind


def _draw_key(figure: Figure, cell: SubplotSpec, time: PowerNorm) -> None:
    """Draw the legend of lines and marks."""
    axes = figure.add_subplot(cell)
    axes.set_axis_off()
    dot = Line2D([], [], marker="o", color="black", markersize=4, mec="white", linestyle="none", label="start, with its number")
    handles = [
        dot,
        Line2D([], [], **_end(on_front=True), label="end, on the Pareto set"),
        Line2D([], [], **_end(on_front=False), label="end, elsewhere"),
        Line2D([], [], color=FRONT, linewidth=4, alpha=0.45, label="Pareto set, and front"),
        Line2D([], [], marker="*", color=FRONT, markersize=9, mec="white", linestyle="none", label="minimum"),
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(-0.12, 1.08), handlelength=1.2, labelspacing=0.35, fontsize=7.5
    )
    bar = axes.inset_axes((0.0, 0.08, 0.95, 0.06))
    scale = figure.colorbar(ScalarMappable(time, TIME), cax=bar, orientation="horizontal")
    scale.set_label("step", labelpad=1)
    scale.outline.set_visible(False)
    bar.xaxis.set_major_locator(ticker.FixedLocator([time.vmax * part for part in (0, 0.1, 0.4, 1)]))  # type: ignore[operator]
    bar.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _limits(seen: Array) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return limits of the plane of the losses that suit all methods."""
    low, high = seen.min(axis=0), seen.max(axis=0)
    room = 0.06 * (high - low)
    (x0, y0), (x1, y1) = low - room, high + room
    return (float(x0), float(x1)), (float(y0), float(y1))


def _label_parameters(axes: Axes, *, first: bool) -> None:
    axes.xaxis.set_major_locator(ticker.FixedLocator([-10, 0, 10]))
    axes.yaxis.set_major_locator(ticker.FixedLocator([-10, 0, 10]))
    _label(axes, "$a$", "$b$", first=first)


def _label(axes: Axes, x: str, y: str, *, first: bool) -> None:
    axes.set_xlabel(x, parse_math=True, labelpad=1)
    axes.tick_params(labelleft=first)
    if first:
        axes.set_ylabel(y, parse_math=True, labelpad=1)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
