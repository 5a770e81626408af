"""Directive ``peer-methods``: the name here of every method of another library, from `tests.peers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from generated import add_directive, to_method
from generated import table as markdown
from method_facts import CALLS, REGISTRIES, takes

from tests.peers import PEERS

if TYPE_CHECKING:
    from sphinx.application import Sphinx

    Here = tuple[str | tuple[str, ...] | None, str | None] | str


def table(peer: str, docname: str) -> str:
    """Return the table of a library's methods, in Markdown.

    Args:
        peer: A name in `tests.peers.PEERS`.
        docname: Page with the table.

    Raises:
        ValueError: If the library is unknown.
    """
    if peer not in PEERS:
        raise ValueError(f"peer-methods must be one of {', '.join(PEERS)}, but got '{peer}'.")
    rows = [[with_code(name), arguments(here), calls(here), pages(here, docname)] for name, here in PEERS[peer].items()]
    return markdown([peer, "arguments of `Balancer`", "further calls", "page"], rows)


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


def pages(here: Here, docname: str) -> str:
    """Return links from a page to the pages of the methods."""
    return ", ".join(to_method(docname, kind, name, name) for kind, name in methods(here)) or "-"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    add_directive(app, "peer-methods", table)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
