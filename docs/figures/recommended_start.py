"""Figure of the table "In a hurry" of docs/choose/which_method.md: three methods on seven problems.

python docs/figures/recommended_start.py    write docs/_static/recommended_start.png, which the README shows
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1]
COLOURS = {"equal weights": "#767676", "famo": "#D55E00", "nashmtl": "#0072B2"}


class Problem(NamedTuple):
    """One row of the table: its name, its measure, and mean and standard error by method."""

    name: str
    measure: str
    values: dict[str, tuple[float, float]]


def problems(page: str) -> list[Problem]:
    """Return the rows of the table in a page."""
    rows = re.findall(r"^\| (.+?) \| (delta\\_m|error) \| (.+?) \| (.+?) \| (.+?) \|", page, flags=re.MULTILINE)
    return [
        Problem(name, measure, {m: number(cell) for m, cell in zip(COLOURS, cells, strict=True) if "±" in cell})
        for name, measure, *cells in rows
    ]


def number(cell: str) -> tuple[float, float]:
    """Return mean and standard error of a cell such as ``20.6 ± 2.3``."""
    mean, _, error = cell.partition(" ± ")
    return float(mean), float(error)


def draw(rows: list[Problem]) -> None:
    """Draw one panel for each problem."""
    figure, panels = plt.subplots(1, len(rows), figsize=(9.6, 2.5), facecolor="white")
    for panel, row in zip(panels, rows, strict=True):
        for place, (method, colour) in enumerate(COLOURS.items()):
            mean, error = row.values.get(method, (float("nan"), 0.0))
            panel.errorbar(place, mean, error, color=colour, marker="o", markersize=6, capsize=3, label=method)
        top = max(mean + error for mean, error in row.values.values())
        panel.set(xlim=(-0.6, len(COLOURS) - 0.4), ylim=(0, 1.15 * top), xticks=[])
        panel.set_title(row.name.replace(", ", ",\n", 1).replace(" model", "\nmodel").replace("' eq", "'\neq"), fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("delta_m in %\n(lower is better)", fontsize=9)
    panels[-1].set_ylabel("error", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1), w_pad=0.4)


if __name__ == "__main__":
    draw(problems((DOCS / "choose/which_method.md").read_text(encoding="utf-8")))
    plt.savefig(DOCS / "_static/recommended_start.png", dpi=130, metadata={"Software": None})
