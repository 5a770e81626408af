"""One pair of methods to begin with, chosen by rules that a study of finished runs has tested."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .findings import Finding

BALANCED = ("ls", None)  # pair for a problem whose gradients need no balance
UNBALANCED = ("ls", "nashmtl")  # pair for a problem in which a task drowns the others
CALLING = ("loss scale", "gradient length", "domination")  # findings that call for the second pair


class Advice(NamedTuple):
    """A pair of methods to begin with.

    Attributes:
        loss_method: Name of the loss balancer.
        gradient_method: Name of the gradient balancer; None for an ordinary backward pass.
        reason: Findings on which the choice rests, in a sentence.
    """

    loss_method: str
    gradient_method: str | None
    reason: str

    def __str__(self) -> str:
        return f"Begin with loss={self.loss_method!r}, gradient={self.gradient_method!r}. {self.reason}"


def advise(findings: Sequence[Finding]) -> Advice:
    """Choose the pair of methods to begin with.

    Args:
        findings: Findings of a diagnosis.

    Returns:
        The pair, with the reason.
    """
    present = [f"{finding.text}." for finding in findings if finding.present and finding.problem in CALLING]
    if present:
        return Advice(*UNBALANCED, " ".join(present))
    return Advice(*BALANCED, "No task has much longer gradients than another, and none dominates their sum.")
