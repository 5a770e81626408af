"""Losses that five preferences reach on a front that bends the wrong way."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import balance

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
CENTRE = torch.full((3,), 3**-0.5)


def losses(theta: Tensor) -> Tensor:
    """Return two losses with a front that is not convex. Shape (3,) -> (2,)."""
    return torch.stack([1 - torch.exp(-(theta - CENTRE).square().sum()), 1 - torch.exp(-(theta + CENTRE).square().sum())])


def train(**choices: Any) -> list[float]:
    """Return the losses after training with the choices of a balancer."""
    theta = torch.tensor([0.3, -0.3, 0.1], requires_grad=True)
    balancer = balance.Balancer(2, **choices)
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        balancer.backward(losses(theta), shared=[theta])
        optimizer.step()
    return losses(theta.detach()).tolist()


preferences = [[share, 1 - share] for share in SHARES]
reached = {
    "priorities": [train(weights=preference) for preference in preferences],
    "epo": [train(gradient="epo", gradient_options={"preference": preference}) for preference in preferences],
}
front = torch.stack([losses(t * CENTRE) for t in torch.linspace(-1, 1, 100)])

figure, axes = plt.subplots(figsize=(5.2, 3.8))
axes.plot(*front.T, color="0.6", label="Pareto front")
for (label, points), marker in zip(reached.items(), ("s", "o"), strict=True):
    axes.plot(*zip(*points, strict=True), marker, label=label)
axes.set_xlabel("loss of task 0")
axes.set_ylabel("loss of task 1")
axes.legend()
figure.tight_layout()
