"""Claims about the methods, from `tests.claims`: in words, whether they hold, with their counter-examples."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from generated import table, to_method
from method_facts import check_kind, names

from balance.testing import GRADIENT_CLAIMS, LOSS_CLAIMS
from tests import claims
from tests.claims.gradient import AT_SECOND_STEP

if TYPE_CHECKING:
    from collections.abc import Iterator

CLAIMS = {"gradient": GRADIENT_CLAIMS, "loss": LOSS_CLAIMS}
ROWS = {"gradient": claims.GRADIENT_ROWS, "loss": claims.LOSS_ROWS}
OPTIONS = {"gradient": claims.GRADIENT_OPTIONS, "loss": claims.LOSS_OPTIONS}
SYMBOLS = {"holds": "✓", "generic": "(✓)", "refuted": "✗", "": "–"}  # noqa: RUF001 - a dash, not a minus
ROWS_OF = {"gradient": "rows of J are the gradients of the tasks", "loss": "rows of L are the losses at successive steps"}


def words(claim: str) -> str:
    """Return the name of a claim as words."""
    return claim.replace("_", " ")


def sentence(kind: str, claim: str) -> str:
    """Return a claim as a sentence, from the docstring of its check."""
    text = " ".join((inspect.getdoc(CLAIMS[kind][claim]) or "").split()).removeprefix("Check that ")
    return text[:1].upper() + text[1:]


def verdict(kind: str, name: str, claim: str) -> str:
    """Return ``holds``, ``generic`` or ``refuted``, or nothing if the claim makes no sense for a method."""
    entry = ROWS[kind][name].get(claim)
    if entry is None:
        return ""
    return "holds" if entry is True else "generic" if entry == claims.GENERIC else "refuted"


def matrix(rows: list[list[float]]) -> str:
    """Return a matrix in LaTeX."""
    lines = r" \\ ".join(" & ".join(f"{number:g}" for number in row) for row in rows)
    return rf"\begin{{pmatrix}} {lines} \end{{pmatrix}}"


def by_verdict(kind: str, name: str) -> dict[str, list[str]]:
    """Return the claims about a method by verdict."""
    sorted_claims: dict[str, list[str]] = {"holds": [], "generic": [], "refuted": []}
    for claim in CLAIMS[kind]:
        if found := verdict(kind, name, claim):
            sorted_claims[found].append(claim)
    return sorted_claims


def section(kind: str, name: str) -> Iterator[str]:
    """Yield the paragraphs about the claims of a method, in Markdown."""
    found = by_verdict(kind, name)
    data = "gradients" if kind == "gradient" else "losses"
    yield f"Tests try each [claim](../claims.md) on random {data}, degenerate ones included."
    yield "A claim holds here if no counter-example was found, which is no proof."
    if kind == "gradient" and name in AT_SECOND_STEP:
        yield "The rule learns, so the claims are tested at its second step, after a step with other gradients."
    yield "**Holds: no counter-example has been found**"
    yield bullets(f"{words(claim)}: {sentence(kind, claim)}" for claim in found["holds"])
    if found["generic"]:
        yield "**Holds for linearly independent gradients**"
        yield bullets(f"{words(claim)}: {sentence(kind, claim)}" for claim in found["generic"])
    if found["refuted"]:
        yield f"**Refuted, with a counter-example** ({ROWS_OF[kind]})"
        yield "\n\n".join(refutations(kind, name, found["refuted"]))
    if further := [(given, holding) for method, given, holding in OPTIONS[kind] if method == name]:
        yield "**Holds with other options**"
        yield bullets(f"`{written(given)}`: {', '.join(map(words, holding))}" for given, holding in further)


def refutations(kind: str, name: str, refuted: list[str]) -> Iterator[str]:
    """Yield the refuted claims, together where they have the same counter-example."""
    by_example: dict[str, list[str]] = {}
    for claim in refuted:
        by_example.setdefault(matrix(ROWS[kind][name][claim]), []).append(claim)
    letter = "J" if kind == "gradient" else "L"
    for example, list_of_claims in by_example.items():
        yield f"$$ {letter} = {example} $$"
        yield "These claims fail for it:"
        yield bullets(f"{words(claim)}: {sentence(kind, claim)}" for claim in list_of_claims)


def written(given: dict[str, object]) -> str:
    """Return options as they are written in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def bullets(lines: Iterator[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def claims_table(kind: str, docname: str) -> str:
    """Return the table of all methods and all claims of a kind.

    Args:
        kind: ``loss`` or ``gradient``.
        docname: Page with the table.

    Raises:
        ValueError: If the kind is unknown.
    """
    check_kind("claims-table", kind)
    header = ["method", *(f"[{words(claim)}](#claim-{claim.replace('_', '-')})" for claim in CLAIMS[kind])]
    rows = [
        [
            to_method(docname, kind, name),
            *(SYMBOLS[verdict(kind, name, claim)] for claim in CLAIMS[kind]),
        ]
        for name in names(kind)
    ]
    return f":::{{container}} claims-table\n{table(header, rows)}\n:::"


def claims_list(kind: str, docname: str = "") -> str:  # noqa: ARG001 - directives give the page
    """Return an explanation of every claim of a kind, with the number of methods that satisfy it.

    Args:
        kind: ``loss`` or ``gradient``.
        docname: Page with the list.

    Raises:
        ValueError: If the kind is unknown.
    """
    check_kind("claims-list", kind)
    lines = []
    for claim in CLAIMS[kind]:
        verdicts = [verdict(kind, name, claim) for name in names(kind)]
        satisfied = sum(found in ("holds", "generic") for found in verdicts)
        asked = sum(found != "" for found in verdicts)
        title = f"[{words(claim)}]{{#claim-{claim.replace('_', '-')}}}"
        lines.append(f"{title} (`{claim}`)\n: {sentence(kind, claim)} {satisfied} of {asked} methods satisfy the claim.")
    return "\n\n".join(lines)
