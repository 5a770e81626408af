"""Directive ``peer-methods``: the name here of every method of another library, from `tests.peers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from method_facts import CALLS, REGISTRIES, takes
from sphinx.util.docutils import SphinxDirective

from tests.peers import PEERS

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

    Here = tuple[str | tuple[str, ...] | None, str | None] | str


def table(peer: str) -> str:
    """Return the table of a library's methods, in Markdown."""
    lines = [f"| {peer} | arguments of `Balancer` | further calls | page |", "| --- | --- | --- | --- |"]
    for name, here in PEERS[peer].items():
        lines.append(f"| {with_code(name)} | {arguments(here)} | {calls(here)} | {pages(here)} |")
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


def methods(here: Here) -> list[tuple[str, str]]:
    """Return the kind and the name of each method; none for a method that does not exist here."""
    if isinstance(here, str):
        return []
    losses = (here[0],) if isinstance(here[0], str) else here[0] or ()
    return [*(("loss", name) for name in losses), *([("gradient", here[1])] if here[1] else [])]


def calls(here: Here) -> str:
    """Return the calls that the methods need in a loop beyond `backward`, from their registration."""
    needs = {need for kind, name in methods(here) for need in REGISTRIES[kind].traits(name).needs}
    needed = [f"`{call}`" for need, call in CALLS.items() if need in needs]
    gradient = [name for kind, name in methods(here) if kind == "gradient"]
    several = any(takes(REGISTRIES["gradient"].build(name, num_tasks=2), "cross") for name in gradient)
    return ", ".join([*needed, *(["`further=`"] if several else [])]) or "-"


def pages(here: Here) -> str:
    """Return links to the pages of the methods."""
    return ", ".join(f"[{name}](../methods/{kind}/{name}.md)" for kind, name in methods(here)) or "-"


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
