"""Directive ``remedies``: the problems that `balance.diagnose` finds, each with the registered methods against it.

Names of methods come from their registrations, and thresholds from the diagnosis, so that the page cannot become outdated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from sphinx.util.docutils import SphinxDirective

from balance import gradient_balancers, loss_balancers
from balance.diagnosis.findings import CANCELLED, DOMINANT, IMBALANCE, UNEVEN_PACE, UNLEVEL
from balance.diagnosis.statistics import NEGLIGIBLE, STABLE
from balance.types import Remedy

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

    from balance.rules.registry import Registry

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


def page() -> str:
    """Return a card for each problem, in Markdown."""
    return "\n".join(card(problem) for problem in get_args(Remedy))


def card(problem: Remedy) -> str:
    """Return the card of a problem: question, sign in the diagnosis, and methods."""
    title, sign = QUESTIONS[problem]
    lists = [
        f"**{registry.kind.capitalize()}s:** {methods(registry, problem)}" for registry in (loss_balancers, gradient_balancers)
    ]
    return "\n".join(
        [f":::{{card}} {title}", f"*{problem.capitalize()}.* {sign}", "", lists[0], "", lists[1], ":::", ""],
    )


def methods(registry: Registry, problem: Remedy) -> str:
    """Return links to the pages of the methods against a problem."""
    folder = f"../methods/{registry.kind.partition(' ')[0]}"
    against = [name for name in registry.names() if problem in registry.traits(name).remedies]
    return ", ".join(f"[`{name}`]({folder}/{name}.md)" for name in against) or "none"


class Remedies(SphinxDirective):
    """Cards of all problems."""

    def run(self) -> list[nodes.Node]:
        """Return the parsed cards."""
        return self.parse_text_to_nodes(page())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_directive("remedies", Remedies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
