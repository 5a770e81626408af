"""The angle of the direction, while the second loss is multiplied by a factor."""

import math

import torch
from matplotlib import pyplot as plt
from style import COLOURS, CONE, LABELS, plane_gradient

from balance import Balancer

ANGLE = 130.0  # between the two gradients
PAIRS = {  # line: loss balancer, gradient balancer, style of the line
    "mean": ("ls", "mean", "-"),
    "upgrad": ("ls", "upgrad", "--"),
    "mgda": ("ls", "mgda", "-."),
    "imtl": ("ls", "imtl", "-"),
    "scaleinvls": ("scaleinvls", "mean", ":"),
}
NAMES = LABELS | {"upgrad": "UPGrad and PCGrad", "scaleinvls": "SI (a loss balancer), then the mean"}
J = torch.tensor([[1.0, 0.0], plane_gradient(ANGLE, 1.0)], dtype=torch.float64)


def angle(loss: str, gradient: str, factor: float) -> float:
    """Return the angle of the direction to the first gradient, in degrees, if the second loss is multiplied by a factor."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([1.0, factor], dtype=torch.float64) * (J @ theta + 1)
    Balancer(2, loss=loss, gradient=gradient).backward(losses, shared=[theta])
    return math.degrees(math.atan2(float(theta.grad[1]), float(theta.grad[0])))


figure, axes = plt.subplots(figsize=(6.8, 3.6), layout="constrained")
factors = torch.logspace(-2, 2, 81).tolist()
axes.axhspan(ANGLE - 90, 90, color=CONE, zorder=0, label="dual cone: no conflict")
for name, (loss, gradient, line) in PAIRS.items():
    angles = [angle(loss, gradient, factor) for factor in factors]
    axes.plot(factors, angles, line, color=COLOURS[name], linewidth=2.2, label=NAMES[name])
axes.set(xscale="log", xlim=(factors[0], factors[-1]), ylim=(-4, ANGLE + 4), xlabel="factor on the second loss")
axes.set(ylabel="angle of the direction", yticks=[0, 40, 65, 90, ANGLE])
axes.set_yticklabels(["0°, as $g_1$", "40°", "65°", "90°", "130°, as $g_2$"])
figure.legend(loc="outside right upper", frameon=False, fontsize=9)
