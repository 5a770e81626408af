"""Problems of multi-task training that the statistics of a diagnosis show, or show to be absent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from .statistics import NEGLIGIBLE, Statistics, median, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..types import Remedy

IMBALANCE = 10.0  # ratio of gradient lengths: the longest has 100 times the squared length of the shortest, and drowns it
UNLEVEL = 3.0  # the same after division by the losses: about 10 times the squared length
DOMINANT = 0.9  # share of one task in the squared length of the summed gradient: the sum is then mostly that task
UNEVEN_PACE = 2.0  # ratio of relative losses: one task has lost half of its loss while another has lost nothing
CANCELLED = 0.2  # length of the summed gradient relative to orthogonal task gradients: 4 % of the squared length remain


class Finding(NamedTuple):
    """One problem of multi-task training.

    Attributes:
        problem: The remedy that methods against it have among their traits.
        text: The evidence, in sentences. The last sentence of a problem that is present has no full stop: methods follow.
        present: Whether the statistics show the problem.
    """

    problem: Remedy
    text: str
    present: bool = True


def find_problems(start: Statistics, end: Statistics) -> list[Finding]:
    """Return the findings of a diagnosis, in the order of a report.

    Args:
        start: Statistics before some training.
        end: Statistics after it, on which most findings rest.
    """
    findings = (
        loss_scale(end),
        gradient_length(end),
        domination(end),
        conflict(start, end),
        training_pace(start, end),
        local_minima(end),
    )
    return [finding for finding in findings if finding is not None]


def loss_scale(end: Statistics) -> Finding:
    """Compare the lengths of the task gradients, before and after division by the losses."""
    longest, shortest = _extremes(end.norms, end.tasks)
    factor, remaining = ratio(end.norms), ratio(end.relative_norms)
    if factor < IMBALANCE:
        text = f"Task gradients are of similar length: the longest, of '{longest}', is {number(factor)} times the shortest."
        if ratio(end.losses) >= IMBALANCE:
            text += " The losses differ more, but only their gradients count."
        return Finding("loss scale", f"{text} Scale is no reason for a loss balancer.", present=False)
    text = f"The gradient of '{longest}' is {number(factor)} times as long as the gradient of '{shortest}'."
    if remaining >= factor:
        text += " Division by the losses does not help, so loss balancers that divide are no remedy."
        return Finding("loss scale", text, present=False)
    return Finding("loss scale", f"{text} Divided by their losses, the gradients differ by a factor of {number(remaining)}")


def gradient_length(end: Statistics) -> Finding | None:
    """Compare the lengths of the task gradients after division by the losses, if they differ before."""
    remaining = ratio(end.relative_norms)
    if ratio(end.norms) < IMBALANCE or remaining < UNLEVEL:
        return None
    longest, shortest = _extremes(end.relative_norms, end.tasks)
    text = f"Even divided by their losses, the gradient of '{longest}' is {number(remaining)} times as long"
    return Finding("gradient length", f"{text} as the gradient of '{shortest}'")


def domination(end: Statistics) -> Finding | None:
    """Find a task that decides the direction of the summed gradient."""
    share, leader = end.shares.max(dim=0)
    if not (share >= DOMINANT and share.isfinite()):
        return None
    return Finding("domination", f"With equal weights the shared parameters follow only '{end.tasks[int(leader)]}'")


def conflict(start: Statistics, end: Statistics) -> Finding:
    """Find gradients that work against each other, by more than chance."""
    pairs = sorted((pair for pair in end.pairs if pair.reading == "conflict"), key=lambda pair: pair.mean)
    if pairs:
        worst, others = pairs[0], len(pairs) - 1
        more = {0: "", 1: ", as does one more pair"}.get(others, f", as do {others} more pairs")
        text = f"{quoted(worst.tasks)} conflict at nearly every batch (cosine {worst.mean:.2f} ± {worst.spread:.2f}){more}"
        return Finding("conflict", text)
    if any(pair.reading == "noise" for pair in end.pairs):
        share = f"{100 * end.conflict_share:.0f} % of all cosines are negative"
        text = f"Conflict is noise: {share}, but no pair of tasks conflicts at nearly every batch."
    else:
        text = f"No tasks conflict: no mean cosine is below -{NEGLIGIBLE}."
    if passing := [pair.tasks for pair in start.pairs if pair.reading == "conflict"]:
        text += f" {quoted(passing[0])} conflict only at the start."
    return Finding("conflict", text, present=False)


def training_pace(start: Statistics, end: Statistics) -> Finding | None:
    """Compare the losses after some training with the losses before it."""
    before, after = median(start.losses), median(end.losses)
    relative = {
        task: float(new / old)
        for task, old, new in zip(end.tasks, before, after, strict=True)
        if old > 0 and new > 0  # relative losses of both signs cannot be compared
    }
    if len(relative) < 2:
        return None
    fast, slow = min(relative, key=relative.__getitem__), max(relative, key=relative.__getitem__)
    if relative[slow] < UNEVEN_PACE * relative[fast]:
        return None
    text = f"Tasks learn at different speed: the loss of '{fast}' is at {100 * relative[fast]:.0f} % of its loss at the start"
    return Finding("training pace", f"{text}, the loss of '{slow}' at {100 * relative[slow]:.0f} %")


def local_minima(end: Statistics) -> Finding | None:
    """Find task gradients that cancel each other, so that equal weights are close to a point where they stop."""
    if end.remaining_length > CANCELLED:
        return None
    text = f"Task gradients cancel each other: their sum has {100 * end.remaining_length:.0f} % of the length of the sum"
    return Finding("local minima", f"{text} of orthogonal gradients, so equal weights hardly train the shared parameters")


def _extremes(values: Tensor, tasks: Sequence[str]) -> tuple[str, str]:
    """Return the tasks with the largest and the smallest median, of those that `ratio` compares. Shape (B, K)."""
    medians = median(values)
    compared = (medians > 0) & medians.isfinite()
    return tasks[int(medians.where(compared, -math.inf).argmax())], tasks[int(medians.where(compared, math.inf).argmin())]


def number(value: float) -> str:
    """Return a number in three digits, without an exponent up to a million."""
    return f"{float(f'{value:.3g}'):g}" if math.isfinite(value) else "-"


def quoted(tasks: Iterable[str]) -> str:
    """Return names for a sentence."""
    return " and ".join(f"'{task}'" for task in tasks)
