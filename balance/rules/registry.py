"""Registries: name -> rule. `loss_balancers` and `gradient_balancers` are the two of this library."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import torch
from torch import nn

from balance.messages import unknown
from balance.types import Heads, Need, Remedy, Sees

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from balance.types import Gramian, Weights

Rule = TypeVar("Rule", bound="Callable[..., Any]")

_FROM_STAGE = ("num_tasks", "present", "losses")  # given by the stage at every step or once, never options of a user


@dataclass(frozen=True)
class Traits:
    """Facts about a registered rule: warnings, recommendations, documentation, tests and benchmarks read them here only.

    Attributes:
        sees: Gradient balancers only: whether the rule maps a Gramian (K, K) to weights (K,) or a Jacobian (K, P) to a
            direction (P,).
        heads: Gradient balancers only: whether the method's paper code multiplies the loss of a task-specific head with the
            task's weight.
        ignores_weights: Gradient balancers only: whether positive weights of the losses make no difference to its step,
            heads included; the stage then warns of a loss balancer that has no effect.
        label: The method's name in its paper and in published tables, such as ``"PCGrad"``.
        paper: Authors, year and web address, such as ``"Yu et al. 2020, https://arxiv.org/abs/2001.06782"``; several are
            separated by semicolons.
        remedies: Problems of multi-task training that the method addresses.
        needs: Conditions that training must meet, beyond a call at each step.
        invariances: Names of the claims of `balance.testing` about scaling, order and rotation that the method satisfies.
        certificate: Gradient balancers with exact solutions: a function of the Gramian (K, K) and of the weights (K,) under
            default options, which returns the relative error of the weights in the method's own optimality conditions.
    """

    sees: Sees = "gramian"
    heads: Heads = "unweighted"
    ignores_weights: bool = False
    label: str = ""
    paper: str = ""
    remedies: tuple[Remedy, ...] = ()
    needs: tuple[Need, ...] = ()
    invariances: tuple[str, ...] = ()
    certificate: Callable[[Gramian, Weights], float] | None = None

    def __post_init__(self) -> None:
        check_type("sees", self.sees, Sees)
        check_type("heads", self.heads, Heads)
        for remedy in self.remedies:
            check_type("Every entry of remedies", remedy, Remedy)
        for need in self.needs:
            check_type("Every entry of needs", need, Need)


@dataclass(frozen=True)
class Method:
    """A registered rule: the callable that builds or is the rule, and its traits."""

    rule: Callable[..., Any]
    traits: Traits


class Registry:
    """Rules by name.

    Args:
        kind: Name of the registered rules in messages, such as ``"loss balancer"``.
        group: Entry-point group through which other packages add rules.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._methods: dict[str, Method] = {}

    def register(
        self,
        name: str,
        *,
        sees: Sees = "gramian",
        heads: Heads = "unweighted",
        ignores_weights: bool = False,
        label: str = "",
        paper: str = "",
        remedies: Sequence[Remedy] = (),
        needs: Sequence[Need] = (),
        invariances: Sequence[str] = (),
        certificate: Callable[[Gramian, Weights], float] | None = None,
    ) -> Callable[[Rule], Rule]:
        """Return a decorator that registers a function or a class, and returns it unchanged.

        Args:
            name: The paper's name in lower case, words joined by underscores.
            sees: See `Traits`, like all arguments below.
            heads: Treatment of task-specific heads.
            ignores_weights: Whether positive weights of the losses have no effect.
            label: Name in papers.
            paper: Authors, year and web address.
            remedies: Problems that the method addresses.
            needs: Conditions on training.
            invariances: Claims that hold.
            certificate: Function of a Gramian and weights that returns the error of the weights.

        Raises:
            ValueError: If ``name`` is taken or is not a lower-case identifier, or a trait has an unknown value.
        """
        if not (name.isidentifier() and name.isascii() and name == name.lower()):
            raise ValueError(
                f"The name of a {self.kind} must be a lower-case identifier, but got {name!r}. Use the paper's name, "
                "words joined by underscores."
            )

        traits = Traits(
            sees, heads, ignores_weights, label, paper, tuple(remedies), tuple(needs), tuple(invariances), certificate
        )

        def decorate(rule: Rule) -> Rule:
            if name in self._methods:
                taken = self._methods[name].rule
                owner = f"{taken.__module__}.{taken.__qualname__}" if hasattr(taken, "__qualname__") else repr(taken)
                raise ValueError(f"The {self.kind} '{name}' is already registered, by {owner}. Choose another name.")
            self._methods[name] = Method(rule, traits)
            return rule

        return decorate

    def names(self) -> tuple[str, ...]:
        """Return the known names, sorted; entry points are listed without being imported."""
        return tuple(sorted({*self._methods, *self._entry_points()}))

    def __contains__(self, name: object) -> bool:
        return name in self._methods or name in self._entry_points()

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self.names()) or 'empty'})"

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
        if not inspect.isclass(rule):
            return functools.partial(rule, **options) if options else rule
        built = rule(**options)
        if isinstance(built, nn.Module):
            options.pop("num_tasks", None)
            vars(built)["registered_as"] = describe(name, options)
        return cast("Callable[..., Any]", built)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options that a user may give to the rule called ``name``, annotations resolved to types."""
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
        """Return the input of a gradient balancer: a ``"gramian"``, mapped to weights, or a ``"jacobian"``, to a direction."""
        return self.method(name).traits.sees

    def heads(self, name: str) -> Heads:
        """Return the treatment of task-specific heads in the paper code of the gradient balancer."""
        return self.method(name).traits.heads

    def traits(self, name: str) -> Traits:
        """Return the traits of the rule called ``name``."""
        return self.method(name).traits

    def method(self, name: str) -> Method:
        """Return the entry called ``name``; an entry point is imported here, on its first use.

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
    """Return an annotation as a type, or Any where the rule's module imports its names for type checkers only."""
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
    """Return whether a rule, built or not, has the keyword."""
    call = rule.forward if isinstance(rule, nn.Module) else rule
    try:
        return keyword in inspect.signature(call).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False


def present_keyword(rule: Callable[..., Any], present: Tensor | None, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return the keyword ``present`` for a call of a rule, or no keyword if all tasks are present or the rule needs none.

    Args:
        rule: A built rule.
        present: Indices of the present tasks; None for all.
        tasks: Names of the present tasks, for the message.

    Raises:
        ValueError: If tasks are absent, and the rule has state but no keyword ``present``.
    """
    if present is None:
        return {}
    if takes(rule, "present"):
        return {"present": present}
    if isinstance(rule, nn.Module) and any(True for state in (rule.parameters(), rule.buffers()) for _ in state):
        names = f"tasks {present.tolist()}" if tasks is None else tuple(tasks)
        raise ValueError(
            f"{type(rule).__name__} keeps state by task, so that all tasks must be present, but only {names} are present. "
            "Give its forward a keyword present=None, the indices of the present tasks."
        )
    return {}


def checked_weights(weights: object, num_tasks: int) -> Weights:
    """Return what a gradient balancer returned, detached, if it is one finite weight for each task.

    Args:
        weights: Result of a gradient balancer.
        num_tasks: Number of tasks that it was applied to.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(weights, torch.Tensor) or weights.shape != (num_tasks,) or not weights.isfinite().all():
        raise ValueError(f"The gradient balancer must return {num_tasks} finite weights, but got {weights}.")
    return weights.detach()


def require_callable(kind: str, rule: object, options: Mapping[str, Any]) -> None:
    """Check a rule that is given by something other than a name.

    Raises:
        ValueError: If there are options.
        TypeError: If the rule is not a callable.
    """
    if not callable(rule):
        raise TypeError(f"A {kind} must be a registered name or a callable, but got {rule!r}.")
    if options:
        raise ValueError(f"Options are for registered names, but got {dict(options)} with {rule!r}. Use functools.partial.")


def describe(rule: object, options: Mapping[str, Any] | None = None) -> str:
    """Return the name and the options of a rule in one line, such as ``cagrad(c=0.9)``.

    Args:
        rule: A registered name, a callable, or a sequence of names, for which the options are by name.
        options: Options of a registered rule.
    """
    if isinstance(rule, list | tuple):
        return " + ".join(describe(part, (options or {}).get(part)) for part in rule)
    if isinstance(rule, functools.partial):
        return _call(describe(rule.func), rule.args, rule.keywords)
    if isinstance(rule, nn.Module) and type(rule).__repr__ is nn.Module.__repr__:
        return str(getattr(rule, "registered_as", type(rule).__name__))
    name = rule if isinstance(rule, str) else getattr(rule, "__qualname__", None) or repr(rule)
    return _call(name, (), options or {})


def _call(name: str, args: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    listed = ", ".join([*map(repr, args), *(f"{option}={value!r}" for option, value in keywords.items())])
    return f"{name}({listed})" if listed else name


loss_balancers = Registry("loss balancer", "balance.loss_balancers")
gradient_balancers = Registry("gradient balancer", "balance.gradient_balancers")
