"""Directive ``peer-methods``: the name here of every method of another library, from `tests.peers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sphinx.util.docutils import SphinxDirective

from tests.peers import PEERS

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

    Here = tuple[str | tuple[str, ...] | None, str | None] | str


def table(peer: str) -> str:
    """Return the table of a library's methods, in Markdown."""
    lines = [f"| {peer} | arguments of `Balancer` | page |", "| --- | --- | --- |"]
    for name, here in PEERS[peer].items():
        lines.append(f"| {with_code(name)} | {arguments(here)} | {pages(here)} |")
    return "\n".join(lines)


def with_code(name: str) -> str:
    """Return a name in code style, and a remark in brackets after it in plain style."""
    word, _, remark = name.partition(" ")
    return f"`{word}` {remark}".strip()


def arguments(here: Here) -> str:
    """Return the arguments of a balancer, or the reason why a method does not exist here."""
    if isinstance(here, str):
        return here
    loss, gradient = here
    parts = [f'loss="{loss}"' if isinstance(loss, str) else f"loss={loss}"] if loss else []
    parts += [f'gradient="{gradient}"'] if gradient else []
    return f"`{', '.join(parts)}`"


def pages(here: Here) -> str:
    """Return links to the pages of the methods."""
    if isinstance(here, str):
        return "-"
    losses = [here[0]] if isinstance(here[0], str) else here[0] or ()
    links = [f"[{name}](../methods/loss/{name}.md)" for name in losses]
    links += [f"[{here[1]}](../methods/gradient/{here[1]}.md)"] if here[1] else []
    return ", ".join(links)


class PeerMethods(SphinxDirective):
    """Table of the methods of the library that the argument names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the parsed table."""
        return self.parse_text_to_nodes(table(self.arguments[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_directive("peer-methods", PeerMethods)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
