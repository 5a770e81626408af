"""Trajectories through the real stage, for any pairing of a loss balancer with a gradient balancer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from balance import Balancer, gradient_balancers, loss_balancers
from balance.messages import unknown
from experiments.problems.toy import closed_forms
from experiments.problems.toy.landscape import LOWER_BOUND, SCALE, STARTS, TASKS, Array, losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

STEPS = 50_000
EPOCH = 1000  # steps, for rules that think in epochs
METHODS = ("ls", "mgda", "pcgrad", "cagrad", "nashmtl", "famo", "go4align")
OPTIONS: Mapping[str, Mapping[str, Any]] = {"famo": {"gamma": 0.0}}  # the published choice for a problem without noise
_STAGE_OPTIONS = {"famo": {"next_batch": True}}  # as the published trainer of this problem has it


class Pairing(NamedTuple):
    """The two methods that a name such as ``famo``, ``mgda`` or ``uw+mgda`` stands for."""

    loss: tuple[str, ...]
    gradient: str | None


def pairing(name: str) -> Pairing:
    """Read the name of a pairing: loss balancers in the order in which they are applied, a gradient balancer, joined by ``+``.

    Raises:
        ValueError: If a part is unknown, or anything follows a gradient balancer.
    """
    *before, last = name.split("+")
    gradient = last if last in gradient_balancers else None
    loss = tuple(before if gradient else (*before, last))
    for part in loss:
        if part not in loss_balancers:
            if part in gradient_balancers:
                raise ValueError(f"A gradient balancer must come last, but got '{name}'. Write for example uw+{part}.")
            raise ValueError(unknown("method", part, (*loss_balancers.names(), *gradient_balancers.names())))
    return Pairing(loss or ("ls",), gradient)


def build_balancer(name: str, options: Mapping[str, Mapping[str, Any]] = OPTIONS) -> Balancer:
    """The stage for a pairing.

    Args:
        name: As `pairing` reads it.
        options: Of the methods, by name.
    """
    loss, gradient = pairing(name)
    return Balancer(
        TASKS,
        loss=loss,
        gradient=gradient,
        loss_options={part: {**_STAGE_OPTIONS.get(part, {}), **options.get(part, {})} for part in loss},
        gradient_options=options.get(gradient or ""),
    )


def descend(
    balancer: Balancer,
    start: tuple[float, float],
    steps: int = STEPS,
    *,
    lr: float = 1e-3,
    balancer_lr: float = 0.025,
    scale: float = SCALE,
    advance: Callable[[int], object] = lambda _: None,
) -> Array:
    """One trajectory; the point is the shared parameter, in double precision.

    The stage gets the losses above their lower bounds, `LOWER_BOUND` of each, since several rules need positive losses; the
    constants change no gradient.

    Args:
        balancer: Fresh, for `TASKS`; it is changed.
        start: Where the point is at first.
        steps: Of Adam.
        lr: Learning rate of the point.
        balancer_lr: Learning rate of parameters that the balancer owns.
        scale: Of the first loss.
        advance: Is told, every now and then, how many steps were done since.

    Returns:
        Points before every step and after the last. Shape (steps + 1, 2).
    """
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": [theta], "lr": lr}, {"params": list(balancer.parameters()), "lr": balancer_lr}])
    path = np.empty((steps + 1, 2))
    path[0] = start
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        balancer.backward(above_bounds(losses(theta), scale), shared=[theta])
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                balancer.observe(above_bounds(losses(theta), scale))
        path[step] = theta.detach().numpy()
        if step % EPOCH == 0:
            balancer.end_epoch()
        if step % 500 == 0 or step == steps:
            advance(step - (step - 1) // 500 * 500)
    return path


def above_bounds(found: Mapping[str, torch.Tensor], scale: float | torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses as the stage gets them: positive, the first times its scale."""
    return {"f1": scale * (found["f1"] - LOWER_BOUND), "f2": found["f2"] - LOWER_BOUND}


def trajectories(
    methods: Sequence[str] = METHODS,
    starts: Sequence[tuple[float, float]] = STARTS,
    steps: int = STEPS,
    *,
    options: Mapping[str, Mapping[str, Any]] = OPTIONS,
    scale: float = SCALE,
    advance: Callable[[str, int], object] = lambda *_: None,
) -> dict[str, Array]:
    """Trajectories by method: in closed form where there is one, else through the stage, one start after the other.

    Args:
        methods: Names as `pairing` reads them.
        starts: S points.
        steps: Of Adam.
        options: Of the methods, by name.
        scale: Of the first loss.
        advance: Is told, every now and then, of which methods how many steps were done since.

    Returns:
        Points before every step and after the last. Shape (steps + 1, S, 2).

    Raises:
        ValueError: If a method is unknown, or lies outside the domain of its rule.
    """
    for method in methods:
        build_balancer(method, options)  # complains before anything is computed
    fast = [method for method in dict.fromkeys(methods) if closed_forms.has(method, options.get(method, {}))]
    found = {}
    if fast:
        told = partial(advance, " ".join(fast))
        found = closed_forms.descend(fast, starts, steps, options, scale=scale, advance=told)
    for method in dict.fromkeys(methods):
        if method not in found:
            told = partial(advance, method)
            paths = [descend(build_balancer(method, options), start, steps, scale=scale, advance=told) for start in starts]
            found[method] = np.stack(paths, axis=1)
    return {method: found[method] for method in methods}
