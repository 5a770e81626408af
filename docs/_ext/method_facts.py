"""Facts about a registered method: its traits in words, its state, the combinations that it allows, and its measured cost."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections import defaultdict
from functools import cache
from itertools import starmap
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import torch
from docstrings import read
from torch import nn

import balance
from balance import compose, gradient_balancers, loss_balancers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from balance.rules.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
REGISTRIES = {"loss": loss_balancers, "gradient": gradient_balancers}
HERE = "balance"  # package whose methods have pages
SIZES = (3, 7), (5, 11)  # K and P of the two problems at which states are measured

REMEDIES = {
    "loss scale": "losses of different size or unit",
    "gradient length": "task gradients of different length",
    "conflict": "task gradients with negative inner products",
    "training pace": "tasks that learn at different speed",
    "domination": "one task that decides the direction",
    "local minima": "random weights that lead out of poor minima",
}
NEEDS = {  # what a user must do, and the page that shows how
    "positive losses": ("all losses must be above zero", "reference/errors.md"),
    "optimizer": ("give `balancer.parameters()` to the optimizer, without weight decay", "concepts/optimizers.md"),
    "observe": ("after each optimizer step, call `balancer.observe(losses)` for the same batch", "start/from_your_loop.md"),
    "end_epoch": ("call `balancer.end_epoch()` once per epoch", "start/from_your_loop.md"),
    "validation": (
        "every few steps, call `balancer.observe_validation(losses)` for a batch of validation data",
        "start/from_your_loop.md",
    ),
    "all tasks": ("all tasks must be present at each step", "concepts/absent_tasks.md"),
    "parameters": (
        '`source="parameters"`, since the rule compares gradients of different steps',
        "concepts/shared_and_heads.md",
    ),
}
CALLS = {  # in a loop, beyond `backward`
    "optimizer": "balancer.parameters()",
    "observe": "observe",
    "end_epoch": "end_epoch",
    "validation": "observe_validation",
}
HEADS = {
    "weighted": "the gradient of a head is multiplied by the weight that the gradient balancer gives its task",
    "unweighted": "the gradient balancer does not change the gradients of the heads",
}


def names(kind: str) -> list[str]:
    """Return the names of the methods of this library, without methods of installed packages and of tests."""
    registry = REGISTRIES[kind]
    return [name for name in registry.names() if module_of(registry, name).partition(".")[0] == HERE]


def check_kind(directive: str, kind: str) -> None:
    """Check the argument of a directive for methods of one kind.

    Raises:
        ValueError: If the kind is neither loss nor gradient.
    """
    if kind not in REGISTRIES:
        raise ValueError(f"{directive} must be for loss or gradient, but got '{kind}'.")


def module_of(registry: Registry, name: str) -> str:
    """Return the module of a rule."""
    return str(registry.method(name).rule.__module__)


def family(kind: str, name: str) -> str:
    """Return the family of a method, which is the last name of its module."""
    return module_of(REGISTRIES[kind], name).rpartition(".")[2]


def families(kind: str) -> dict[str, list[str]]:
    """Return the methods by family."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in names(kind):
        members[family(kind, name)].append(name)
    return dict(sorted(members.items()))


def about_family(kind: str, name: str) -> str:
    """Return the first sentence of the docstring of a family's module."""
    return read(sys.modules[f"balance.{kind}.{name}"]).summary


def options(kind: str, name: str) -> list[inspect.Parameter]:
    """Return the options of a rule without its seed, which the stage sets."""
    return [option for option in REGISTRIES[kind].options(name).values() if option.name != "seed"]


def default(option: inspect.Parameter) -> str:
    """Return the default of an option as it is written in Python."""
    return "required" if option.default is option.empty else repr(option.default)


def annotation(kind: Any) -> str:
    """Return a type as a reader writes it, the alternatives of a literal type in quotation marks."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(annotation, get_args(kind)))
    if kind is NoneType:
        return "None"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def papers(kind: str, name: str) -> str:
    """Return Markdown links of the papers of a method; empty without a paper."""
    entries = (paper.rpartition(", ") for paper in filter(None, REGISTRIES[kind].traits(name).paper.split("; ")))
    return ", ".join(f"[{authors or address}]({address})" for authors, _, address in entries)


@cache
def state(kind: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return what a checkpoint keeps of a rule: names and shapes, in K and P where the shapes depend on them."""
    small, large = (_shapes(kind, name, *size) for size in SIZES)
    return tuple((key, _shape(small[key], large[key])) for key in small if key in large)


def _shapes(kind: str, name: str, num_tasks: int, num_parameters: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the entries of a rule's state after one step; scalars in a list count as one tensor."""
    rule = REGISTRIES[kind].build(name, num_tasks=num_tasks)
    if not isinstance(rule, nn.Module):
        return {}
    run_once(kind, name, rule, num_tasks, num_parameters)
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = defaultdict(int)
    for key, value in rule.state_dict().items():
        stem = re.sub(r"\.\d+$", "", key)
        counts[stem] += 1
        shapes[stem] = (counts[stem],) if stem != key else tuple(value.shape)
    return shapes


def run_once(kind: str, name: str, rule: Callable[..., Any], num_tasks: int, num_parameters: int) -> None:
    """Apply a rule to random losses or gradients."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(num_tasks, generator=generator, dtype=torch.float64) + 0.5
    jacobian = torch.randn(num_tasks, num_parameters, generator=generator, dtype=torch.float64)
    if kind == "loss":
        rule(losses.requires_grad_())
        return
    data = jacobian if gradient_balancers.sees(name) == "jacobian" else jacobian @ jacobian.T
    rule(data, **({"losses": losses} if takes(rule, "losses") else {}))


def takes(rule: Callable[..., Any], keyword: str) -> bool:
    """Return whether a rule has a keyword."""
    return keyword in inspect.signature(rule.forward if isinstance(rule, nn.Module) else rule).parameters


def _shape(small: tuple[int, ...], large: tuple[int, ...]) -> str:
    """Return a shape in K and P, given its values for two problems."""
    symbols = {pair: symbol for symbol, pair in zip("KP", zip(*SIZES, strict=True), strict=True)}
    symbols[4, 6] = "K + 1"
    sizes = [symbols.get((a, b), str(a) if a == b and a else "n") for a, b in zip(small, large, strict=True)]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def state_in_words(kind: str, name: str) -> str:
    """Return the state of a rule as a list in Markdown."""
    entries = []
    for key, shape in state(kind, name):
        if key.endswith("random._extra_state"):
            entries.append("a random generator")
        elif key.endswith("_extra_state"):
            entries.append(f"further state {shape}")
        else:
            entries.append(f"`{key}` {shape}")
    return ", ".join(entries) or "none"


@cache
def combinations(kind: str, name: str) -> tuple[tuple[str, bool], ...]:
    """Return which combinations a method allows, in Markdown with links from the folder of the documentation."""
    if kind == "loss":
        builds: dict[str, Callable[[], object]] = {
            "[one loss per sample](how_to/per_sample.md)": lambda: balance.Balancer(None, loss=name),
            "after another loss balancer in a chain": lambda: balance.Balancer(2, loss=("constant", name)),
        }
    else:
        builds = {
            '[`source="features"`](choose/cost.md)': lambda: balance.Balancer(2, gradient=name, source="features"),
            '[`memory="gramian"`](choose/cost.md)': lambda: balance.Balancer(2, gradient=name, memory="gramian"),
            "[one loss per sample](how_to/per_sample.md)": lambda: balance.Balancer(None, gradient=name),
            "[`Splitter`](reference/splitter.md)": lambda: balance.Splitter(2, gradient=name),
            "[`balance.compose`](reference/rules.md)": lambda: compose.every(2, name, 2),
        }
    return tuple((label, builds_without_error(build)) for label, build in builds.items())


def builds_without_error(build: Callable[[], object]) -> bool:
    """Return whether a combination can be built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            build()
        except (ValueError, TypeError):
            return False
    return True


def newest(kind: str, suffix: str = "json") -> Path | None:
    """Return the newest file of a kind of benchmark; None without."""
    return max((ROOT / "benchmarks/results").glob(f"*_{kind}_*.{suffix}"), default=None)


def cost(kind: str, name: str) -> str:
    """Return the measured times of a rule in the newest record of benchmarks; empty if it has not been measured."""
    file = newest("rules")
    if kind == "loss" or file is None:
        return ""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    times = [(size, rows[name]["ms"]) for size, rows in results.items() if name in rows]
    if not times:
        return ""
    listed = ", ".join(f"{milliseconds:.2f} ms at {size.replace('=', ' = ')}" for size, milliseconds in times)
    return f"{listed}, for a solve on one thread (record `{file.name}`)"


def facts(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield titles and values of the table of facts, in Markdown with links from the folder of the documentation."""
    traits = REGISTRIES[kind].traits(name)
    yield "paper", papers(kind, name) or "none"
    relatives = [f"[{other}](methods/{kind}/{other}.md)" for other in families(kind)[family(kind, name)] if other != name]
    yield "family", f"`{family(kind, name)}`" + (f", with {', '.join(relatives)}" if relatives else "")
    if kind == "gradient":
        sees = {"gramian": "the Gramian (K, K), mapped to weights", "jacobian": "the Jacobian (K, P), mapped to a direction"}
        yield "sees", sees[traits.sees]
    yield "remedy for", "; ".join(f"{remedy} ({REMEDIES[remedy]})" for remedy in traits.remedies) or "nothing; a baseline"
    yield "needs", "; ".join(starmap(_need, (NEEDS[need] for need in traits.needs))) or "nothing beyond a call at each step"
    yield "state in a checkpoint", state_in_words(kind, name)
    yield from _facts_of_gradient(kind, name)
    allowed = [label for label, works in combinations(kind, name) if works]
    refused = [label for label, works in combinations(kind, name) if not works]
    if allowed:
        yield "works with", ", ".join(allowed)
    if refused:
        yield "does not work with", ", ".join(refused)
    if measured := cost(kind, name):
        yield "cost", f"{measured}; the backward passes cost more, see [cost](choose/cost.md)"
    else:
        yield "cost", "see [cost](choose/cost.md), or run `python -m balance methods`"


def _need(action: str, page: str) -> str:
    return f"{action} ([more]({page}))"


def _facts_of_gradient(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the facts that only gradient balancers have."""
    if kind == "loss":
        return
    traits = gradient_balancers.traits(name)
    yield "heads", f"{traits.heads}: {HEADS[traits.heads]} ([more](concepts/shared_and_heads.md))"
    if traits.ignores_weights:
        yield "loss weights", "positive weights of the losses have no effect, so a loss balancer changes nothing"
    if traits.certificate is not None:
        yield "solution", "exact; a certificate measures its error, see [cost](choose/cost.md)"
