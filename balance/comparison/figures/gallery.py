"""All figures of a comparison, their captions, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context

from .delta_m import delta_m
from .scatter import cost, most_opposed, pareto
from .training import conflicts, curves, validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..run_table import RunTable
    from .drawing import Curves

CAPTIONS = {
    "delta_m": "Mean relative drop against networks that learn one task only. Further left is better; left of the line the "
    "tasks gain from each other. Large marks are means over seeds, strokes single seeds, bars 95 % intervals of the mean; a "
    "bar that reaches the edge continues beyond it.",
    "pareto": "Gain on one metric against loss on another: means over seeds with their standard errors. On both metrics "
    "together no method beats the points with a black rim, and the line bounds their region. Numbers as in the table.",
    "cost": "Cost and result of a method: time of a training step relative to ls, against the result. Lower left is better. No "
    "method is both faster and better than the points with a black rim. Numbers as in the table.",
    "curves": "Training by task: the losses before any weighting, and the weights of losses and gradients. Means over seeds "
    "and short stretches of training. The color shows the loss balancer, the line style the gradient balancer.",
    "conflicts": "Above, the share of task pairs with opposed gradients: lower is more harmony. Below, the cosine between the "
    "gradients of each pair: red pairs hinder each other, blue pairs help. Means over seeds.",
    "validation": "Validation metrics over training, means over seeds. The arrow shows the better direction.",
}


def every_figure(table: RunTable, logged: Curves | None = None, axes: tuple[str, str] | None = None) -> dict[str, Figure]:
    """Draw all figures that have content, by name.

    Args:
        table: The comparison to draw.
        logged: Curves that the runs logged during training; None for no figures of training.
        axes: The two metrics of the Pareto plot; None for the metrics on which the methods disagree most.

    Returns:
        Figures by name.

    Raises:
        ValueError: If one of ``axes`` is not a metric of the comparison.
    """
    axes = axes or most_opposed(table)
    figures = {
        "delta_m": delta_m(table),
        "pareto": pareto(table, *axes) if axes else None,
        "cost": cost(table),
        "curves": curves(table, logged or {}),
        "conflicts": conflicts(table, logged or {}),
        "validation": validation(table, logged or {}),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Save each figure as ``<name>.pdf``, for a paper, and as ``<name>.png``; create the folder if it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        pdf, png = folder / f"{name}.pdf", folder / f"{name}.png"
        with rc_context({"pdf.fonttype": 42}):  # publishers refuse Type 3 fonts
            figure.savefig(pdf, metadata={"CreationDate": None})  # equal figures make equal files
        figure.savefig(png, dpi=150)
        files += [pdf, png]
    return files
