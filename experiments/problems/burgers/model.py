"""A network from points to the solution, and the residual of the equation by automatic differentiation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import grad

from balance.config import setting
from experiments.problems.base import Network
from experiments.problems.burgers.solution import VISCOSITY


@dataclass
class ModelConfig:
    """Size of the network."""

    width: int = setting(32, minimum=1, help="units of a hidden layer")
    depth: int = setting(4, minimum=1, help="number of hidden layers")


class Solution(nn.Module):
    """A multi-layer perceptron u(x, t), with the residual u_t + u u_x - viscosity u_xx at the same points."""

    scale: Tensor
    shift: Tensor

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [2, *[width] * depth]
        layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]), persistent=False)
        self.register_buffer("shift", torch.tensor([0.0, -1.0]), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """Return solution and residual, also inside of `torch.no_grad`. Shape (B, 2) -> (B, 2)."""
        is_training = torch.is_grad_enabled()
        with torch.enable_grad():  # the residual needs gradients with respect to the points, in evaluations too
            fields = self.fields(points.detach().requires_grad_())
        return fields if is_training else fields.detach()

    def fields(self, points: Tensor) -> Tensor:
        """Return solution and residual at points (x, t) that require gradients. Shape (B, 2) -> (B, 2)."""
        u = self.layers(points * self.scale + self.shift).squeeze(1)  # x and t in -1..1
        u_x, u_t = grad(u.sum(), points, create_graph=True)[0].unbind(dim=1)
        u_xx = grad(u_x.sum(), points, create_graph=True)[0][:, 0]
        return torch.stack([u, u_t + u * u_x - VISCOSITY * u_xx], dim=1)


class Conditions(nn.Module):
    """Outputs by task; no parameters."""

    def forward(self, fields: Tensor) -> dict[str, Tensor]:
        """Return solution and residual (B, 2) for the residual, and the solution (B,) for the two conditions."""
        return {"residual": fields, "boundary": fields[:, 0], "initial": fields[:, 0]}


def build_model(config: ModelConfig | None = None) -> Network:
    """Return a freshly initialised network, whose parameters are all shared."""
    config = config or ModelConfig()
    return Network(Solution(config.width, config.depth), Conditions())
