"""Catalogue of the registered methods: a table of all, and a page of one."""

from __future__ import annotations

import inspect
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .messages import unknown
from .rules.generator import SeededGenerator
from .rules.registry import Registry, gradient_balancers, loss_balancers

if TYPE_CHECKING:
    from collections.abc import Callable

REGISTRIES = {"loss": loss_balancers, "gradient": gradient_balancers}
NUM_TASKS, NUM_PARAMETERS = 11, 10_000  # of the problem on which costs are measured
COLUMNS = ("name", "kind", "family", "needs", "state", f"ms at K={NUM_TASKS}", "paper")


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
        name: Registered name.
        kind: ``"loss"`` or ``"gradient"``.
        family: Module of the rule, which contains similar rules.
        needs: Conditions that training must meet.
        state: Kind of the rule's state.
        milliseconds: Median time of one call, measured now.
        paper: Authors, year and web address.
    """

    name: str
    kind: str
    family: str
    needs: str
    state: str
    milliseconds: float
    paper: str


def entries() -> list[Entry]:
    """Return all registered methods, loss balancers first, with costs that are measured on this machine."""
    return [entry_of(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]


def entry_of(kind: str, name: str) -> Entry:
    """Return the line of one method.

    Args:
        kind: ``"loss"`` or ``"gradient"``.
        name: A registered name.
    """
    registry = REGISTRIES[kind]
    method = registry.method(name)
    family = method.rule.__module__.rpartition(".")[2]
    needs = ", ".join([*method.traits.needs, *(["Jacobian"] if method.traits.sees == "jacobian" else [])])
    return Entry(name, kind, family, needs or "-", state_of(registry, name), cost_of(kind, name), method.traits.paper or "-")


def state_of(registry: Registry, name: str) -> str:
    """Return the kind of state that a rule keeps between steps."""
    rule = registry.build(name, num_tasks=NUM_TASKS)
    if not isinstance(rule, nn.Module):
        return "-"
    kinds = {
        "trained": any(True for _ in rule.parameters()),
        "buffers": any(True for _ in rule.buffers()),
        "random": any(isinstance(module, SeededGenerator) for module in rule.modules()),
    }
    return ", ".join(kind for kind, has in kinds.items() if has) or "-"


def cost_of(kind: str, name: str, *, repetitions: int = 9) -> float:
    """Return the median time of one call of a rule, on one thread, in milliseconds.

    Args:
        kind: ``"loss"`` or ``"gradient"``.
        name: A registered name.
        repetitions: Number of measured calls; the first two calls are not measured.
    """
    call, threads = _call_of(kind, name), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [_seconds(call) for _ in range(repetitions + 2)][2:]
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(times)


def table() -> str:
    """Return all methods as lines of aligned columns."""
    rows = [COLUMNS, *((*entry[:5], f"{entry.milliseconds:.2f}", entry.paper) for entry in entries())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def page(name: str) -> str:
    """Return the description of the methods with one name: traits, options with their defaults, and the docstring.

    Args:
        name: Name of a loss balancer, of a gradient balancer, or of both.

    Raises:
        ValueError: If no method has the name.
    """
    kinds = [kind for kind, registry in REGISTRIES.items() if name in registry]
    if not kinds:
        names = [known for registry in REGISTRIES.values() for known in registry.names()]
        raise ValueError(unknown("method", name, names))
    return "\n\n".join(_page(kind, name) for kind in kinds)


def _page(kind: str, name: str) -> str:
    registry, entry = REGISTRIES[kind], entry_of(kind, name)
    traits = registry.traits(name)
    facts = {
        "paper": entry.paper,
        "remedy for": ", ".join(traits.remedies) or "-",
        "needs": entry.needs,
        "state": entry.state,
        "heads": traits.heads if kind == "gradient" else "",
        "invariances": ", ".join(claim.replace("_", " ") for claim in traits.invariances) or "-",
        f"time at K={NUM_TASKS}": f"{entry.milliseconds:.2f} ms",
        "options": ", ".join(f"{option.name}={option.default!r}" for option in registry.options(name).values()) or "-",
    }
    lines = [f"{name}: {traits.label or name} ({registry.kind})", ""]
    lines += [f"{fact + ':':16s}{value}" for fact, value in facts.items() if value]
    return "\n".join([*lines, "", inspect.getdoc(registry.method(name).rule) or "No description."])


def _call_of(kind: str, name: str) -> Callable[[], object]:
    """Return a call of a new rule on random losses or gradients."""
    rule = REGISTRIES[kind].build(name, num_tasks=NUM_TASKS)
    random = torch.Generator().manual_seed(0)
    losses = torch.rand(NUM_TASKS, generator=random, dtype=torch.float64) + 0.5
    if kind == "loss":
        return lambda: rule(losses.clone().requires_grad_())
    jacobian = torch.randn(NUM_TASKS, NUM_PARAMETERS, generator=random, dtype=torch.float64)
    data = jacobian if gradient_balancers.sees(name) == "jacobian" else jacobian @ jacobian.T
    call = rule.forward if isinstance(rule, nn.Module) else rule
    keywords = {"losses": losses} if "losses" in inspect.signature(call).parameters else {}
    return lambda: rule(data, **keywords)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
