"""Directive ``remedies``: the problems that `balance.diagnose` finds, each with the registered methods against it.

Names of methods come from their registrations, and thresholds from the diagnosis, so that the page cannot become outdated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from generated import add_directive, to_method
from method_facts import REGISTRIES, names

from balance.diagnosis.findings import CANCELLED, DOMINANT, IMBALANCE, UNEVEN_PACE, UNLEVEL
from balance.diagnosis.statistics import NEGLIGIBLE, STABLE
from balance.types import Remedy

if TYPE_CHECKING:
    from sphinx.application import Sphinx

QUESTIONS: dict[Remedy, tuple[str, str]] = {  # title and sign of each problem
    "loss scale": (
        "Do the losses differ in size or unit?",
        f"The longest task gradient is at least {IMBALANCE:g} times as long as the shortest, and less so after division by the "
        "losses.",
    ),
    "gradient length": (
        "Do the gradients differ in length, even relative to the losses?",
        f"After division by the losses, the longest task gradient is still at least {UNLEVEL:g} times as long as the shortest.",
    ),
    "domination": (
        "Does one task decide the direction?",
        f"One task makes up at least {DOMINANT:.0%} of the squared length of the summed gradient.",
    ),
    "conflict": (
        "Do two tasks work against each other?",
        f"The mean cosine of a pair of task gradients is negative, by at least {STABLE:g} standard deviations over the "
        f"batches. A pair whose mean and deviation are both within {NEGLIGIBLE:g} counts as orthogonal.",
    ),
    "training pace": (
        "Do the tasks learn at different speed?",
        f"After a little training, the relative loss of the slowest task is at least {UNEVEN_PACE:g} times the relative loss "
        "of the fastest.",
    ),
    "local minima": (
        "Do the gradients cancel each other?",
        f"The summed gradient has at most {CANCELLED:.0%} of the length that it would have if the task gradients were "
        "orthogonal.",
    ),
}


def cards(_: str, docname: str) -> str:
    """Return a card for each problem, in Markdown."""
    return "\n".join(card(problem, docname) for problem in get_args(Remedy))


def card(problem: Remedy, docname: str) -> str:
    """Return the card of a problem: question, sign in the diagnosis, and methods."""
    title, sign = QUESTIONS[problem]
    lists = [f"**{registry.kind.capitalize()}s:** {methods(kind, problem, docname)}" for kind, registry in REGISTRIES.items()]
    return "\n".join([f":::{{card}} {title}", f"*{problem.capitalize()}.* {sign}", "", lists[0], "", lists[1], ":::", ""])


def methods(kind: str, problem: Remedy, docname: str) -> str:
    """Return links to the pages of the methods against a problem."""
    against = [name for name in names(kind) if problem in REGISTRIES[kind].traits(name).remedies]
    return ", ".join(to_method(docname, kind, name) for name in against) or "none"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    add_directive(app, "remedies", cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
