"""Tables and sentences of the recorded study "Which method?"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from generated import add_directive

from balance.comparison.formats import markdown
from experiments.studies.ranking import rank_methods
from experiments.studies.record import StudyRecord, read_record
from experiments.studies.report import (
    advice_table,
    choice_table,
    diagnosis_table,
    failures,
    result_table,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx

PARTS: dict[str, Callable[[StudyRecord], str]] = {
    "summary": lambda record: summary(record, rank_methods(record)),
    "results": lambda record: markdown(result_table(record, rank_methods(record))),
    "advice": lambda record: markdown(advice_table(record)),
    "diagnosis": lambda record: markdown(diagnosis_table(record)),
    "choices": lambda record: markdown(choice_table(record)),
    "failures": lambda record: "\n".join(failures(record)) or "No run failed.",
}


def part(name: str, _: str) -> str:
    """Return a part of the study in Markdown.

    Args:
        name: One of `PARTS`.

    Returns:
        The text.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in PARTS:
        raise ValueError(f"The directive study must have one of {', '.join(PARTS)}, but got '{name}'.")
    return PARTS[name](read_record())


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive ``study``."""
    add_directive(app, "study", part)
    return {"parallel_read_safe": True}
