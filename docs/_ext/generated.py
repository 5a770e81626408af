"""Directives whose content is Markdown that a function returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from docutils import nodes
    from sphinx.application import Sphinx


def add_directive(app: Sphinx, name: str, content: Callable[[str, str], str]) -> None:
    """Add a directive to a site.

    Args:
        app: The site.
        name: Name of the directive.
        content: Function of the argument of the directive, empty without, and of the name of the page. It returns Markdown,
            whose headings are one level below the section of the directive. A ValueError becomes a warning.
    """
    from docutils.nodes import Element  # noqa: PLC0415 - only with Sphinx
    from docutils.statemachine import StringList  # noqa: PLC0415
    from sphinx.util.docutils import SphinxDirective  # noqa: PLC0415

    class Generated(SphinxDirective):
        """A directive that parses generated Markdown."""

        optional_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[nodes.Node]:
            """Return the nodes of the generated text."""
            try:
                text = content("".join(self.arguments), self.env.docname)
            except ValueError as error:
                raise self.error(str(error)) from None
            parent = Element()
            parent.document = self.state.document
            self.state.nested_parse(StringList(text.splitlines(), source=name), self.content_offset, parent, match_titles=True)
            return parent.children

    app.add_directive(name, Generated)


def table(header: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> str:
    """Return a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: Cells, in Markdown; bars in them are escaped here.
        right: Numbers of the columns that are aligned to the right.
    """
    rules = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_page(docname: str, target: str) -> str:
    """Return a relative link from a page to another one.

    Args:
        docname: Name of the page with the link, such as ``methods/index``.
        target: Path of the other page from the folder of the documentation, such as ``methods/loss/uw.md``.
    """
    return "../" * docname.count("/") + target


def to_method(docname: str, kind: str, name: str, text: str = "") -> str:
    """Return a link in Markdown to the page of a method; its text is the name in code style, if no other is given."""
    return f"[{text or f'`{name}`'}]({to_page(docname, f'methods/{kind}/{name}.md')})"
