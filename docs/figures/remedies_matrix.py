"""Figure of the methods with two or more remedies, from their registrations."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import matplotlib.pyplot as plt

from balance import gradient_balancers, loss_balancers
from balance.types import Remedy

if TYPE_CHECKING:
    from balance.rules.registry import Registry

KINDS = ((loss_balancers, "#0b62a4"), (gradient_balancers, "#a8480a"))
problems = get_args(Remedy)


def several(registry: Registry) -> list[str]:
    """Return the methods with two or more remedies, most remedies first."""
    names = [name for name in registry.names() if len(registry.traits(name).remedies) > 1]
    return sorted(names, key=lambda name: (-len(registry.traits(name).remedies), name))


rows = [(name, registry, colour) for registry, colour in KINDS for name in several(registry)]
figure, axes = plt.subplots(figsize=(6.4, 0.22 * len(rows) + 1.1))
for registry, colour in KINDS:
    points = [
        (problems.index(remedy), row)
        for row, (name, kind, _) in enumerate(rows)
        if kind is registry
        for remedy in registry.traits(name).remedies
    ]
    axes.scatter(*zip(*points, strict=True), s=55, color=colour, label=registry.kind, zorder=2)
axes.set(xlim=(-0.5, len(problems) - 0.5), ylim=(len(rows) - 0.5, -0.5), ylabel="method")
axes.set_xticks(range(len(problems)), [problem.replace(" ", "\n") for problem in problems])
axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
axes.xaxis.tick_top()
axes.set_xlabel("problem that the method remedies")
axes.xaxis.set_label_position("top")
axes.grid(color="#e3e3e3", zorder=0)
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
figure.legend(loc="lower center", ncol=2, frameon=False)
figure.tight_layout(rect=(0, 0.05, 1, 1))
