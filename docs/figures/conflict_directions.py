"""Two task gradients in the plane, with and without conflict, and the directions of five rules."""

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Wedge
from style import COLOURS, CONE, LABELS, arrow, direction_of, plane_gradient

RULES = ("upgrad", "pcgrad", "imtl", "mgda", "mean")
WIDTHS = {"mean": 0.007, "pcgrad": 0.01, "upgrad": 0.02, "imtl": 0.012, "mgda": 0.012}
FIRST, LENGTHS = 5.0, (2.0, 1.0)  # angle of the first gradient, and both lengths


def draw(axes: Axes, angle: float, title: str) -> None:
    """Draw both gradients at an angle, the dual cone, and the directions."""
    second = FIRST + angle
    J = torch.tensor([plane_gradient(FIRST, LENGTHS[0]), plane_gradient(second, LENGTHS[1])], dtype=torch.float64)
    axes.add_patch(Wedge((0, 0), 9, second - 90, FIRST + 90, color=CONE, zorder=0))
    for gradient, name in zip(J, ("$g_1$", "$g_2$"), strict=True):
        arrow(axes, gradient, color="#777777", width=0.014, zorder=2)
        place = gradient + 0.2 * gradient / gradient.norm()
        axes.text(float(place[0]), float(place[1]), name, ha="center", va="center")
    for order, rule in enumerate(RULES):
        arrow(axes, direction_of(J, rule), color=COLOURS[rule], width=WIDTHS[rule], zorder=3 + order)
    axes.set(xlim=(-1.2, 2.6), ylim=(-0.6, 2.2), aspect="equal", xlabel="parameter 1", ylabel="parameter 2", title=title)
    axes.set_xticks([])
    axes.set_yticks([])


figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.7), layout="constrained")
draw(left, 80, "no conflict: 80°")
draw(right, 130, "conflict: 130°")
handles = [Line2D([], [], color="#777777", linewidth=3, label="task gradients")]
handles += [Line2D([], [], color=COLOURS[rule], linewidth=3, label=LABELS[rule]) for rule in RULES]
handles.append(Patch(color=CONE, label="dual cone"))
figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
