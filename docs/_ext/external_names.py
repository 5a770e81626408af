"""Resolution of short names, such as ``Tensor`` for ``torch.Tensor``, and of names of methods, which have pages.

Signatures and docstrings use the names that are short in their module. They are replaced by the names under which this site,
or the site of another project, documents them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import balance
from balance import gradient_balancers, loss_balancers, types

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

ABC = ("Callable", "Collection", "Iterable", "Iterator", "Mapping", "MutableMapping", "Sequence")
OTHERS = {
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "nn.Parameter": "torch.nn.Parameter",
    "Module": "torch.nn.Module",
    "Parameter": "torch.nn.Parameter",
    "Optimizer": "torch.optim.Optimizer",
    "GradScaler": "torch.amp.GradScaler",
    "ProcessGroup": "torch.distributed.ProcessGroup",
    "Any": "typing.Any",
    "Literal": "typing.Literal",
    "Path": "pathlib.Path",
    "Trainer": "lightning.pytorch.Trainer",
    "LightningModule": "lightning.pytorch.LightningModule",
    "Accelerator": "accelerate.Accelerator",
    "DictConfig": "omegaconf.DictConfig",
    "AbstractContextManager": "contextlib.AbstractContextManager",
    **{name: f"collections.abc.{name}" for name in ABC},
}
INSIDE = {  # names that this site documents under their modules
    "Estimate": "balance.engine.engine.Estimate",
    "Registry": "balance.rules.registry.Registry",
    "Traits": "balance.rules.registry.Traits",
    "Method": "balance.rules.registry.Method",
    "Context": "balance.rules.context.Context",
    "TaskError": "balance.rules.context.TaskError",
    "LossBalancer": "balance.rules.protocol.LossBalancer",
    "GradientBalancer": "balance.rules.protocol.GradientBalancer",
    "JacobianBalancer": "balance.rules.protocol.JacobianBalancer",
    "Switch": "balance.rules.switch.Switch",
    "StageConfig": "balance.config.StageConfig",
    "Statistics": "balance.diagnosis.statistics.Statistics",
    "Pair": "balance.diagnosis.statistics.Pair",
    "Price": "balance.diagnosis.statistics.Price",
    "Cost": "balance.profiling.Cost",
    "RunTable": "balance.comparison.run_table.RunTable",
    "Row": "balance.comparison.run_table.Row",
    "Tracker": "balance.tracking.Tracker",
    "Logger": "balance.tracking.Logger",
    "Loggers": "balance.tracking.Loggers",
    "TensorBoard": "balance.tracking.TensorBoard",
    "WandB": "balance.tracking.WandB",
    "RuleUnderTest": "balance.testing.RuleUnderTest",
    "TaskLosses": "balance.integrations.transformers.TaskLosses",
}
EXPANDED = {  # aliases that have no page, as readers see them
    "Batch": "Any",
    "Counts": "Mapping[str, float] | Sequence[float] | Tensor",
    "Factory": "Callable[[int], Callable]",
    "Features": "Tensor | Sequence | Mapping",
    "LossFunction": "Callable[[LightningModule, Any], Mapping | Tensor]",
    "Rule": "Callable",
    "Shared": "Iterable[Tensor] | Callable",
    "Turn": "str | Callable | tuple[str, Mapping] | None",
}
UNLINKED = ("Every", "Grouped", "OptimizerMetric", "RecordedRun", "Smoothed", "Store", "T")  # internal classes and variables


def full_names() -> dict[str, str]:
    """Return the documented name by short name, and by the name of the module in which a public object is defined."""
    names = OTHERS | INSIDE
    names |= {name: f"balance.types.{name}" for name in vars(types).get("__annotations__", {})}
    for name in balance.__all__:
        public = getattr(balance, name)
        if hasattr(public, "__qualname__"):
            names |= dict.fromkeys((name, f"{public.__module__}.{public.__qualname__}"), f"balance.{name}")
    names |= dict.fromkeys(("Comparison", "balance.comparison.comparison.Comparison"), "balance.Comparison")
    names |= dict.fromkeys(("compare", "balance.comparison.comparison.compare"), "balance.compare")
    for name in balance.compose.__all__:
        public = getattr(balance.compose, name)
        names[f"{public.__module__}.{name}"] = f"balance.compose.{name}"
    return names


FULL = full_names()


def replace_short_names(app: Sphinx, doctree: nodes.document) -> None:  # noqa: ARG001 - Sphinx gives the arguments
    """Give references to short names their full names, before Sphinx resolves them."""
    from docutils import nodes  # noqa: PLC0415 - only with Sphinx
    from sphinx.addnodes import pending_xref  # noqa: PLC0415

    for node in list(doctree.findall(pending_xref)):
        if node.get("refdomain") != "py":
            continue
        if text := expansion(node.get("py:module") or "", node["reftarget"]):
            node.replace_self(nodes.Text(text))
        elif target := full_name(node["reftarget"]):
            node["reftarget"], node["reftype"] = target, "obj"


def full_name(name: str) -> str:
    """Return the documented name for a short name, also of an attribute such as ``Balancer.collect``; empty if unknown."""
    head, _, tail = name.partition(".")
    return FULL.get(name) or (f"{FULL[head]}.{tail}" if tail and head in FULL else "")


def expansion(module: str, name: str) -> str:
    """Return the text that replaces the name of an alias in a signature; empty for any other name.

    Args:
        module: Module of the signature, in which a literal type may have that name.
        name: The name as the signature has it.
    """
    short = name.rpartition(".")[2]
    if short in EXPANDED or short in UNLINKED:
        return EXPANDED.get(short, short)
    if name in FULL:
        return ""
    places = [sys.modules.get(module), *(sys.modules[key] for key in sorted(sys.modules) if key.startswith("balance."))]
    for place in places:
        alias = getattr(place, name, None)
        if get_origin(alias) is Literal:
            return " | ".join(map(repr, get_args(alias)))
    return ""


def link_to_method(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Return a link to the page of a method, for the name of a method in backticks on another page of a method."""
    from sphinx.util.nodes import make_refnode  # noqa: PLC0415 - only with Sphinx

    name, docname = node.get("reftarget"), node.get("refdoc", "")
    if node.get("reftype") != "obj" or not docname.startswith("methods/"):
        return None
    for kind, registry in (("gradient", gradient_balancers), ("loss", loss_balancers)):
        target = f"methods/{kind}/{name}"
        if name in registry and target in env.all_docs:
            return make_refnode(app.builder, docname, target, None, content)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("doctree-read", replace_short_names)
    app.connect("missing-reference", link_to_method)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
