"""A fan of preferences between two tasks, as configurations of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance import gradient_balancers, loss_balancers
from balance.config import method_names
from balance.messages import unknown
from experiments.sweeps.plan import Configuration

if TYPE_CHECKING:
    from collections.abc import Sequence


def shares(points: int) -> list[float]:
    """Return evenly spaced shares of the first task, symmetric, without 0 and 1.

    Args:
        points: Their number, at least 2.

    Raises:
        ValueError: If there are fewer.
    """
    if points < 2:
        raise ValueError(f"--points must be at least 2, but got {points}.")
    return [(i + 0.5) / points for i in range(points)]


def preference(share: float, pair: tuple[str, str], tasks: Sequence[str]) -> list[float]:
    """Return a preference of all tasks, which sums to 1.

    Args:
        share: Share of the first task of the pair, in 0..1; the second has the rest.
        pair: The two tasks, which together have as much as two tasks with equal preference.
        tasks: All tasks.

    Raises:
        ValueError: If the pair are not two different tasks.
    """
    for task in pair:
        if task not in tasks:
            raise ValueError(unknown("task in --tasks", task, tasks))
    if pair[0] == pair[1]:
        raise ValueError(f"--tasks must be two different tasks, but got {pair[0]} twice.")
    parts = {pair[0]: 2 * share, pair[1]: 2 * (1 - share)}
    return [round(parts.get(task, 1.0) / len(tasks), 6) for task in tasks]


def overrides_of(loss_method: str, gradient_method: str, values: Sequence[float], tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides that give a preference to a pair of methods.

    The option ``preference`` of the gradient balancer is set, else the option of the loss balancer. Where neither has one, the
    priorities of the tasks are set.

    Args:
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or ``"none"``.
        values: The preference, which sums to 1.
        tasks: All tasks.
    """
    listed = f"[{','.join(map(str, values))}]"
    if gradient_method != "none" and "preference" in gradient_balancers.options(gradient_method):
        return (f"gradient.preference={listed}",)
    names = method_names(loss_method)
    for name in names:
        if "preference" in loss_balancers.options(name):
            return (f"loss.{name}.preference={listed}" if len(names) > 1 else f"loss.preference={listed}",)
    return tuple(f"balancer.weights.{task}={round(value * len(tasks), 6)}" for task, value in zip(tasks, values, strict=True))


def configurations(
    loss_methods: Sequence[str], gradient_methods: Sequence[str], points: int, pair: tuple[str, str], tasks: Sequence[str]
) -> list[tuple[Configuration, float]]:
    """Return one configuration for each pair of methods and each share of the first task.

    Args:
        loss_methods: Names of loss balancers, or of chains.
        gradient_methods: Names of gradient balancers, or ``"none"``.
        points: Number of shares.
        pair: The two tasks.
        tasks: All tasks.

    Returns:
        Configurations, each with its share.
    """
    fan = []
    for loss in loss_methods:
        for gradient in gradient_methods:
            for share in shares(points):
                overrides = overrides_of(loss, gradient, preference(share, pair, tasks), tasks)
                fan.append((Configuration(loss, gradient, overrides, f"{loss} {gradient} {share:.3f}"), share))
    return fan
