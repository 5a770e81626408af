"""Resolution of the short names that annotations use, such as ``Tensor`` for ``torch.Tensor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FULL = {
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "nn.Parameter": "torch.nn.Parameter",
    "Module": "torch.nn.Module",
    "Parameter": "torch.nn.Parameter",
    "Optimizer": "torch.optim.Optimizer",
    "GradScaler": "torch.amp.GradScaler",
    "ProcessGroup": "torch.distributed.ProcessGroup",
    "Any": "typing.Any",
    "Path": "pathlib.Path",
    "AbstractContextManager": "contextlib.AbstractContextManager",
    **{
        name: f"collections.abc.{name}"
        for name in ("Callable", "Iterable", "Iterator", "Mapping", "MutableMapping", "Sequence")
    },
}


def replace_short_names(app: Sphinx, doctree: Any, docname: str) -> None:  # noqa: ARG001 - Sphinx gives the arguments
    """Give references to short names their full names, before Sphinx resolves them."""
    from sphinx.addnodes import pending_xref  # noqa: PLC0415 - only with Sphinx

    for node in doctree.findall(pending_xref):
        if node.get("refdomain") == "py" and node.get("reftarget") in FULL:
            node["reftarget"] = FULL[node["reftarget"]]
            node["reftype"] = "obj"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("doctree-read", lambda app, doctree: replace_short_names(app, doctree, ""))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
