"""Checks of the choices that a balancer is built with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ..rules.options import check_type
from ..types import EngineChoice, Heads, Memory, Scale, Source
from .arguments import NanPolicy, ZeroPolicy

if TYPE_CHECKING:
    from ..rules.protocol import GradientBalancer, JacobianBalancer


#: Time of errors in the values of losses: at once on the host and one call later on an accelerator, or always at once
Checks: TypeAlias = Literal["auto", "now"]


def check_choices(
    source: object, heads: object, scale: object, nan: object, zero: object, engine: object, memory: object, checks: object
) -> None:
    """Check the choices of a balancer.

    Raises:
        TypeError: If a choice has the wrong type.
        ValueError: If a choice is unknown.
    """
    check_type("source", source, Source)
    check_type("scale", scale, Scale)
    check_type("nan", nan, NanPolicy)
    check_type("zero", zero, ZeroPolicy)
    check_type("engine", engine, EngineChoice)
    check_type("memory", memory, Memory)
    check_type("checks", checks, Checks)
    if heads is not None:
        check_type("heads", heads, Heads)


def check_jacobian_balancer(name: str, heads: Heads, scale: Scale, memory: Memory) -> None:
    """Check the choices of a balancer whose rule sees the Jacobian.

    Raises:
        ValueError: If the rule cannot work with them.
    """
    if heads == "weighted" or scale == "sum":
        raise ValueError(
            f"'{name}' sees the Jacobian and has no weights, but got heads={heads!r}, scale={scale!r}. "
            'Use heads="unweighted" and scale="paper" or "norm".'
        )
    if memory == "gramian":
        raise ValueError(f"'{name}' sees the Jacobian, which memory='gramian' does not keep. Use memory='jacobian'.")


def check_metric(source: Source, rule: GradientBalancer | JacobianBalancer | None) -> None:
    """Check that a balancer can measure gradients in the metric of an optimizer.

    Raises:
        ValueError: If it has no rule that returns weights, or does not measure the gradients of parameters.
    """
    if rule is None or rule.sees == "jacobian":
        raise ValueError("metric needs a gradient balancer that returns weights, since it changes the Gramian. Leave it out.")
    if source == "features":
        raise ValueError('metric needs source="parameters", since an optimizer has no diagonal for features. Leave it out.')
