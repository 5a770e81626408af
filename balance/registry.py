"""Registries: name -> rule. `loss_balancers` and `gradient_balancers` are the two of this library."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from balance.shapes import Heads, Sees

Rule = TypeVar("Rule", bound="Callable[..., Any]")

_FROM_STAGE = ("num_tasks", "present", "losses")  # given by the stage at every step or once, never options of a user


@dataclass(frozen=True)
class Method:
    """A registered rule: what builds it, and what the stage must know about it."""

    rule: Callable[..., Any]
    sees: Sees
    heads: Heads
    ignores_weights: bool


class Registry:
    """Rules by name.

    Args:
        kind: What is registered, for messages: ``"loss balancer"``.
        group: Entry-point group through which other packages add rules.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._methods: dict[str, Method] = {}

    def register(
        self, name: str, *, sees: Sees = "gramian", heads: Heads = "unweighted", ignores_weights: bool = False
    ) -> Callable[[Rule], Rule]:
        """Decorator that registers a function or a class, and returns it unchanged.

        Args:
            name: The paper's name in lower case, words joined by underscores.
            sees: Gradient balancers only: whether the rule maps a Gramian (K, K) to weights (K,) or a Jacobian (K, P) to
                a direction (P,).
            heads: Gradient balancers only: whether the method's paper code multiplies the loss of a task-specific
                head with the task's weight.
            ignores_weights: Gradient balancers only: whether positive weights of the losses make no difference to its
                step, heads included; the stage then warns of a loss balancer that has no effect.

        Raises:
            ValueError: If ``name`` is taken, or is not a lower-case identifier.
        """
        if not (name.isidentifier() and name.isascii() and name == name.lower()):
            raise ValueError(
                f"The name of a {self.kind} must be a lower-case identifier, but got {name!r}. Use the paper's name, "
                "words joined by underscores."
            )

        def decorate(rule: Rule) -> Rule:
            if name in self._methods:
                taken = self._methods[name].rule
                owner = f"{taken.__module__}.{taken.__qualname__}" if hasattr(taken, "__qualname__") else repr(taken)
                raise ValueError(f"The {self.kind} '{name}' is already registered, by {owner}. Choose another name.")
            self._methods[name] = Method(rule, sees, heads, ignores_weights)
            return rule

        return decorate

    def names(self) -> tuple[str, ...]:
        """Known names, sorted; those of entry points are listed without being imported."""
        return tuple(sorted({*self._methods, *self._entry_points()}))

    def __contains__(self, name: object) -> bool:
        return name in self._methods or name in self._entry_points()

    def build(self, name: str, **options: Any) -> Callable[..., Any]:
        """Build the rule called ``name``.

        Args:
            name: A registered name.
            **options: Keyword arguments of the rule. ``num_tasks`` may always be given; a rule without state ignores it.

        Returns:
            A callable: (K,) -> (K,) for a loss balancer; for a gradient balancer (K, K) -> (K,), or (K, P) -> (P,) where
            `sees` says ``"jacobian"``.

        Raises:
            ValueError: If the name or an option is unknown, or an option has a value that it cannot have.
            TypeError: If an option has the wrong type, or a required one is missing.
        """
        rule = self.method(name).rule
        known = self.options(name)
        num_tasks = options.pop("num_tasks", None)
        for option, value in options.items():
            if option not in known:
                raise ValueError(unknown(f"option of {self.kind} '{name}'", option, known))
            check_type(f"Option '{option}' of {self.kind} '{name}'", value, known[option].annotation)
        missing = [option for option, p in known.items() if p.default is p.empty and option not in options]
        if missing:
            raise TypeError(f"The {self.kind} '{name}' needs its option '{missing[0]}', which has no default.")
        if "num_tasks" in _parameters(rule):
            if not isinstance(num_tasks, int) or num_tasks < 1:
                raise TypeError(
                    f"The {self.kind} '{name}' has state: build it with num_tasks=K, an int >= 1, but got {num_tasks!r}."
                )
            options["num_tasks"] = num_tasks
        if inspect.isclass(rule):
            return cast("Callable[..., Any]", rule(**options))
        return functools.partial(rule, **options) if options else rule

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Options that a user may give to the rule called ``name``, annotations resolved to types."""
        rule = self.method(name).rule
        parameters = list(_parameters(rule).values())
        if not inspect.isclass(rule):
            parameters = parameters[1:]  # the data
        return {
            p.name: p.replace(annotation=_resolved(p.annotation, rule))
            for p in parameters
            if p.name not in _FROM_STAGE and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }

    def sees(self, name: str) -> Sees:
        """Whether the gradient balancer maps a ``"gramian"`` to weights or a ``"jacobian"`` to a direction."""
        return self.method(name).sees

    def heads(self, name: str) -> Heads:
        """How the paper code of the gradient balancer treats task-specific heads."""
        return self.method(name).heads

    def method(self, name: str) -> Method:
        """The entry called ``name``; an entry point is imported here, on its first use.

        Raises:
            ValueError: If nothing has that name.
        """
        if name not in self._methods:
            entry_point = self._entry_points().get(name)
            if entry_point is None:
                raise ValueError(unknown(self.kind, name, self.names()))
            rule = entry_point.load()  # which may register itself
            if name not in self._methods:
                self.register(name)(rule)
        return self._methods[name]

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.group)}


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Message about a name that nobody knows: what was probably meant, and what is known."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(known) if known else 'none'}."


def check_type(what: str, value: object, annotation: Any) -> None:
    """Check a value against a simple annotation: numbers, strings, Literal, Optional, sequences of those.

    Raises:
        ValueError: If a Literal does not list the value.
        TypeError: If the type is wrong.
    """
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"{what} must be one of {', '.join(map(repr, get_args(annotation)))}, but got {value!r}.")
    elif not _has_type(value, annotation):
        raise TypeError(f"{what} must be {_spelled(annotation)}, but got {value!r}.")


def _resolved(annotation: Any, rule: Callable[..., Any]) -> Any:
    """An annotation as a type, Any where the rule's module imports its names for type checkers only."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(getattr(rule, "__module__", ""))
    try:
        return eval(annotation, vars(module) if module else {})  # noqa: S307 - source code, not input
    except Exception:  # noqa: BLE001 - whatever an annotation of others may be, it is not our error
        return Any


def _parameters(rule: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(rule).parameters
    except (TypeError, ValueError):  # built-in functions have no signature, and so no options
        return {}


def _has_type(value: object, annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return any(_has_type(value, choice) for choice in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple) and get_args(annotation):
        elements = get_args(annotation)
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and elements[-1] is not Ellipsis:
            return len(value) == len(elements) and all(map(_has_type, value, elements))
        return all(_has_type(v, elements[0]) for v in value)
    if annotation in (str, bool, NoneType):
        return isinstance(value, annotation)
    return True  # anything richer is for the rule itself to check


def _spelled(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("None" if a is NoneType else _spelled(a) for a in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def takes(rule: Callable[..., Any], keyword: str) -> bool:
    """Whether a rule, built or not, has the keyword."""
    call = rule.forward if isinstance(rule, nn.Module) else rule
    try:
        return keyword in inspect.signature(call).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False


loss_balancers = Registry("loss balancer", "balance.loss_balancers")
gradient_balancers = Registry("gradient balancer", "balance.gradient_balancers")
