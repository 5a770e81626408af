"""Trajectories of the point, for any pairing of a loss balancer with a gradient balancer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from balance import Balancer, gradient_balancers, loss_balancers
from balance.messages import unknown
from experiments.problems.toy.landscape import SCALE, TASKS, Array, above_bounds, losses

if TYPE_CHECKING:
    from collections.abc import Mapping

    Options = Mapping[str, Mapping[str, Any]]  # of methods, by name

# The published trajectories have 50 000 steps of 0.001 and beta2 = 0.999. With these they end on the same side of the front
STEPS, LR, BETA2 = 5000, 0.01, 0.99
EPOCH = 1000  # steps after which rules that update once per epoch are called
METHODS = ("ls", "mgda", "pcgrad", "cagrad", "nashmtl", "famo", "go4align")
OPTIONS: Options = yaml.safe_load(Path(__file__).with_name("config.yaml").read_text(encoding="utf-8"))["methods"]


class Pairing(NamedTuple):
    """The two methods that a name such as ``famo``, ``mgda`` or ``uw+mgda`` stands for."""

    loss: tuple[str, ...]
    gradient: str | None


def pairing(name: str) -> Pairing:
    """Read the name of a pairing.

    Args:
        name: Loss balancers in the order in which they are applied, then perhaps a gradient balancer, joined by ``+``.

    Returns:
        The names of the methods.

    Raises:
        ValueError: If a method is unknown, or follows a gradient balancer.
    """
    *before, last = name.split("+")
    gradient = last if last in gradient_balancers else None
    loss = tuple(before if gradient else (*before, last))
    for part in loss:
        if part not in loss_balancers and part in gradient_balancers:
            raise ValueError(f"A gradient balancer must come last, but got '{name}'. Write for example uw+{part}.")
        if part not in loss_balancers:
            raise ValueError(unknown("method", part, (*loss_balancers.names(), *gradient_balancers.names())))
    return Pairing(loss or ("ls",), gradient)


def build_balancer(name: str, options: Options = OPTIONS) -> Balancer:
    """Return the balancer of a pairing.

    Args:
        name: A name that `pairing` reads.
        options: Options of the methods, by name.

    Returns:
        The balancer of the two tasks.
    """
    loss, gradient = pairing(name)
    return Balancer(
        TASKS,
        loss=loss,
        gradient=gradient,
        loss_options={part: options.get(part, {}) for part in loss},
        gradient_options=options.get(gradient or ""),
    )


def descend(
    balancer: Balancer,
    start: tuple[float, float],
    steps: int = STEPS,
    *,
    lr: float = LR,
    beta2: float = BETA2,
    balancer_lr: float = 0.025,
    scale: float = SCALE,
) -> Array:
    """Compute one trajectory with Adam; the point is the only parameter, and shared.

    Unlike the trainer it keeps every point, and computes in double precision.

    Args:
        balancer: A new balancer for `TASKS`; its state changes.
        start: First point.
        steps: Number of steps.
        lr: Learning rate of the point.
        beta2: Decay of Adam's mean of squared gradients.
        balancer_lr: Learning rate of the balancer's parameters.
        scale: Scale of the first loss.

    Returns:
        Points before every step and after the last. Shape (steps + 1, 2).
    """
    point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    groups = [{"params": [point], "lr": lr, "betas": (0.9, beta2)}, {"params": [*balancer.parameters()], "lr": balancer_lr}]
    optimizer = torch.optim.Adam(groups)
    path = [start]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        balancer.backward(above_bounds(losses(point), scale), shared=[point])
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                balancer.observe(above_bounds(losses(point), scale))
        if step % EPOCH == 0:
            balancer.end_epoch()
        path.append(tuple(point.tolist()))
    return np.array(path)
