"""Lengths of the directions of six rules for one Jacobian, for each value of ``scale``."""

import torch
from matplotlib import pyplot as plt
from style import direction_of

RULES = {
    "sum": "sum",
    "mean": "mean",
    "upgrad": "UPGrad",
    "mgda": "MGDA",
    "imtl": "IMTL-G",
    "pcgrad": "PCGrad",
    "nashmtl": "Nash-MTL",
}
SCALES = {"paper": "#0072B2", "sum": "#E69F00", "norm": "#009E73"}
HATCHES = {"paper": "", "sum": "//", "norm": ".."}
J = torch.randn(5, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

figure, axes = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
for place, (scale, colour) in enumerate(SCALES.items()):
    lengths = [float(direction_of(J, rule, scale).norm()) for rule in RULES]
    positions = [rule + 0.27 * (place - 1) for rule in range(len(RULES))]
    axes.bar(positions, lengths, 0.25, color=colour, hatch=HATCHES[scale], edgecolor="white", label=f'scale="{scale}"')
axes.set_xticks(range(len(RULES)), RULES.values())
axes.set(xlabel="gradient balancer", ylabel="length of the direction")
figure.legend(loc="outside upper center", ncols=3, frameon=False)
