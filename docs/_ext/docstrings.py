"""Docstrings in the style of Google, taken apart: text, sections, and the entries of a section."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import NamedTuple

TITLES = ("Args", "Returns", "Raises", "Yields", "Attributes", "Source", "Sources", "Note", "Example")
TITLE = re.compile(rf"^({'|'.join(TITLES)}):$", re.MULTILINE)
ENTRY = re.compile(r"^(\**\w+): ?", re.MULTILINE)
CITATION = re.compile(r'^[^"]*"[^"]+"[^";]*?\b(?:19|20)\d\d')  # authors, title, place and year


class Docstring(NamedTuple):
    """A docstring in parts, each of which is reStructuredText.

    Attributes:
        summary: The first sentence.
        body: The text before the sections, after the first paragraph.
        sections: Text of each section by title, without its indentation.
    """

    summary: str
    body: str
    sections: dict[str, str]

    def entries(self, section: str) -> dict[str, str]:
        """Return the entries of a section by name, such as the meanings of the arguments; each is one line."""
        pieces = ENTRY.split(self.sections.get(section, ""))[1:]
        return {name.lstrip("*"): " ".join(text.split()) for name, text in zip(pieces[::2], pieces[1::2], strict=True)}

    @property
    def source(self) -> str:
        """Text of the section ``Source``, one line."""
        return " ".join(self.sections.get("Source", self.sections.get("Sources", "")).split())

    @property
    def citation(self) -> str:
        """Authors, title, place and year of the first paper in the source; empty without a paper."""
        found = CITATION.match(self.source)
        return f"{found[0]}." if found else ""

    @property
    def differences(self) -> str:
        """Sentences of the source from "Differs" on; empty without."""
        found = re.search(r"(?<=[.)] )Differs\b.*", self.source)
        return found[0] if found else ""


def read(described: object) -> Docstring:
    """Return the docstring of an object in parts.

    Args:
        described: A function, class or module.
    """
    text = inspect.getdoc(described) or ""
    pieces = TITLE.split(text)
    summary, _, body = pieces[0].strip().partition("\n\n")
    sections = {title: textwrap.dedent(content).strip() for title, content in zip(pieces[1::2], pieces[2::2], strict=True)}
    return Docstring(" ".join(summary.split()), body.strip(), sections)


def without_text(lines: list[str]) -> list[str]:
    """Return the lines of a docstring from its first section with arguments on, without the source."""
    kept, keeps = [], False
    for line in lines:
        if found := TITLE.match(line):
            keeps = found[1] in ("Args", "Returns", "Raises", "Yields", "Attributes")
        if keeps:
            kept.append(line)
    return kept
