"""Options of a rule: read from its signature, checked against its annotations, and written in one line."""

from __future__ import annotations

import functools
import inspect
import sys
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_FROM_STAGE = ("num_tasks", "present", "losses", "cross")  # passed by the stage, never options of a user


def parameters(rule: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a rule; none for a built-in function without a signature."""
    try:
        return inspect.signature(rule).parameters
    except (TypeError, ValueError):
        return {}


def options(rule: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the options that a user may give to a rule, with annotations resolved to types.

    Args:
        rule: A function of the data, or a class whose instances are such functions.
    """
    listed = list(parameters(rule).values())
    if not inspect.isclass(rule):
        listed = listed[1:]  # the data
    return {
        p.name: p.replace(annotation=_resolved(p.annotation, rule))
        for p in listed
        if p.name not in _FROM_STAGE and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


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


def _resolved(annotation: Any, rule: Callable[..., object]) -> Any:
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
