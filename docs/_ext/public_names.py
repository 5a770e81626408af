"""Public names of the library, each of which a page of the site must document; another name is a warning."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import balance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

MODULES = ("balance.metrics", "balance.config", "balance.testing", "balance.tracking", "balance.types")
INTEGRATIONS = ("lightning", "transformers", "accelerate")  # modules with the names of the packages that they need
UNDOCUMENTED = {  # values and modules whose names other pages explain
    "balance.__version__",
    "balance.comparison",
    "balance.compose",
    "balance.config",
    "balance.gradient",
    "balance.integrations",
    "balance.loss",
    "balance.metrics",
    "balance.testing",
    "balance.tracking",
}


def public_names() -> Iterator[str]:
    """Yield all public names, with the names of their modules."""
    yield from (f"balance.{name}" for name in {*balance.__all__, *balance._ON_FIRST_USE})
    yield from (f"balance.compose.{name}" for name in balance.compose.__all__)
    modules = [*MODULES, *(f"balance.integrations.{name}" for name in INTEGRATIONS if find_spec(name))]
    for path in modules:
        yield from (f"{path}.{name}" for name in names_of(import_module(path)))


def names_of(module: Any) -> list[str]:
    """Return the names in ``__all__``, or without it the functions, classes and aliases that a module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    annotated = [name for name in vars(module).get("__annotations__", {}) if not name.startswith("_")]
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return [*defined, *annotated]


def check(app: Sphinx, env: BuildEnvironment) -> None:  # noqa: ARG001 - Sphinx gives the arguments
    """Warn of public names that no page documents."""
    from sphinx.util import logging  # noqa: PLC0415 - only with Sphinx

    documented = env.domains.python_domain.objects
    for name in sorted(set(public_names()) - UNDOCUMENTED):
        if name not in documented:
            logging.getLogger(__name__).warning("The public name %s is documented on no page of docs/reference.", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
