"""One pair of methods to begin with, chosen by rules whose regret a study of finished runs has measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ..types import Remedy
    from .findings import Finding

BALANCED = ("ls", None)  # pair where no task drowns the others
UNBALANCED = ("ls", "nashmtl")  # pair where one does: the best single pair of the study
CALLING: frozenset[Remedy] = frozenset({"loss scale", "gradient length", "domination", "training pace"})
MANY_TASKS = 20  # from here on a step of K backward passes is several times as expensive, and won nothing in the study


class Advice(NamedTuple):
    """A pair of methods to begin with.

    Attributes:
        loss_method: Name of the loss balancer.
        gradient_method: Name of the gradient balancer; None for an ordinary backward pass.
        reason: Findings on which the choice rests, in sentences.
    """

    loss_method: str
    gradient_method: str | None
    reason: str

    def __str__(self) -> str:
        return f"Begin with loss={self.loss_method!r}, gradient={self.gradient_method!r}. {self.reason}"


def advise(findings: Sequence[Finding], num_tasks: int) -> Advice:
    """Choose the pair of methods to begin with.

    Args:
        findings: Findings of a diagnosis.
        num_tasks: Number of tasks, K.

    Returns:
        The pair, with the reason.
    """
    present = [finding for finding in findings if finding.present and finding.problem in CALLING]
    pair = choose_pair({finding.problem for finding in present}, num_tasks)
    if pair == UNBALANCED:
        return Advice(*pair, " ".join(f"{finding.text}." for finding in present))
    if present:
        return Advice(*pair, f"With {num_tasks} tasks, a gradient balancer needs {num_tasks} backward passes in each step.")
    return Advice(*pair, "Gradients have similar lengths, no task dominates their sum, and all tasks learn at similar speed.")


def choose_pair(problems: Collection[Remedy], num_tasks: int) -> tuple[str, str | None]:
    """Return the pair of methods for a set of problems, and a number of tasks."""
    return UNBALANCED if num_tasks < MANY_TASKS and not CALLING.isdisjoint(problems) else BALANCED
