"""Drawing that all figures share: the style of each row, axes that suit their numbers, downsampled curves."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.lines import Line2D
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ..run_table import Row

Array = NDArray[np.float64]
Series = tuple[Array, Array]  # steps (T,), means over seeds (T,)
Curves = Mapping[str, Mapping[str, Series]]  # by label of the row, then by name such as "loss/<task>" or "cosine/<a>__<b>"
Dash = tuple[float, tuple[float, ...]]

WIDTH = 7.0  # inches, the text width of a paper: 8 pt stay 8 pt there
POINTS = 60  # points of a curve: their means show the course of training, not the noise of single batches

# Okabe and Ito without yellow, which is lost on white; the last four are for tables of many methods
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#5D3A9B")
DASHES: tuple[Dash, ...] = (
    (0, ()),
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (2.5, 1)),
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#6B6B6B"

STYLE: Any = {  # Any, since matplotlib 3.11 lists all keys in the type and earlier ones do not
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.labelsize": 8,
    "figure.titlesize": 8,
    "font.size": 8,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "xtick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 8,
    "ytick.major.width": 0.6,
}


class RowStyle(NamedTuple):
    """Number, color, dash and marker of a row, the same in every figure.

    Attributes:
        number: Position of the row in the table, from 1.
        name: Number and label, for legends.
        color: Color, by loss balancer.
        dash: Dash of lines, by gradient balancer.
        marker: Marker of points, by gradient balancer.
    """

    number: int
    name: str
    color: str
    dash: Dash
    marker: str

    @property
    def line(self) -> Line2D:
        """Entry of a legend of lines."""
        return Line2D([], [], color=self.color, linestyle=self.dash, label=self.name)


def row_styles(rows: Sequence[Row]) -> dict[str, RowStyle]:
    """Return the styles by label. Rows with equal methods and different settings get a color each."""
    times = Counter((row.loss_method, row.gradient_method) for row in rows)
    hues = [row.loss_method if times[row.loss_method, row.gradient_method] == 1 else row.label for row in rows]
    colors = list(dict.fromkeys(hues))
    gradients = list(dict.fromkeys([None, *(row.gradient_method for row in rows)]))  # no balancer: always the solid line
    styles = {}
    for number, (row, hue) in enumerate(zip(rows, hues, strict=True), start=1):
        color, kind = colors.index(hue) % len(COLORS), gradients.index(row.gradient_method) % len(DASHES)
        name = f"{number}  {wrapped(row.label, 36)}"
        styles[row.label] = RowStyle(number, name, COLORS[color], DASHES[kind], MARKERS[kind])
    return styles


def choose_scale(axes: Axes, side: Literal["x", "y"], values: Iterable[float]) -> str:
    """Make an axis logarithmic if all values are positive and spread over more than a factor of ten.

    Returns:
        The name of the scale.
    """
    axis = axes.xaxis if side == "x" else axes.yaxis
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) < 10 * min(finite):
        axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        return "linear"
    axes.set(**{f"{side}scale": "log"})
    label_logarithms(axis, few=max(finite) >= 100 * min(finite), most=6)
    axis.set_minor_formatter(ticker.NullFormatter())
    return "log"


def label_logarithms(axis: Axis, *, few: bool, most: int) -> None:
    """Label a logarithmic axis with plain numbers: powers of ten, and with ``few=False`` their multiples by 2 and 5."""
    axis.set_major_locator(ticker.LogLocator(subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=most))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def label_steps(axis: Axis) -> None:
    """Label an axis of training steps with few and short numbers."""
    axis.set_major_locator(ticker.MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def legend_size(handles: Sequence[Artist]) -> tuple[int, float]:
    """Return the columns of a legend as wide as the page, and its height in inches; 1 and 0 without handles."""
    lines = [line for handle in handles for line in str(handle.get_label()).split("\n")]
    if not lines:
        return 1, 0.0
    columns = max(1, int(WIDTH / (0.5 + 0.068 * max(map(len, lines)))))
    return columns, 0.2 + 0.16 * math.ceil(len(lines) / columns)


def downsampled(steps: Array, values: Array) -> Series:
    """Return means over equal stretches of a series with more points than `POINTS`; values that are not finite are left out."""
    finite = np.isfinite(values)
    if len(values) <= POINTS:
        return steps, np.where(finite, values, math.nan)
    starts = np.linspace(0, len(values), POINTS, endpoint=False).astype(int)
    counts = np.add.reduceat(finite.astype(float), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(POINTS, math.nan), where=counts > 0)
    return np.add.reduceat(steps, starts) / np.diff([*starts, len(steps)]), means


def without_outliers(values: Iterable[float]) -> tuple[float, float]:
    """Return the range of the values, without the few that would squeeze all others into a tenth of the axis."""
    inside = sorted(values)
    while len(inside) > 2:
        cut = int(np.diff(inside).argmax()) + 1
        rest = max(inside[:cut], inside[cut:], key=len)
        if 2 * len(rest) <= len(inside) or not 0 < rest[-1] - rest[0] < 0.1 * (inside[-1] - inside[0]):
            break
        inside = rest
    return inside[0], inside[-1]


def wrapped(text: str, width: int) -> str:
    """Return the text in lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width)) or text
