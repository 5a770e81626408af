"""Registries of rules by name, with the traits of each rule.

`loss_balancers` and `gradient_balancers` are the registries of this library.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from ..messages import suggestion, unknown
from ..types import Heads, Need, Remedy, Sees
from .options import check_type, describe, parameters
from .options import options as rule_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ..types import Gramian, Weights

Rule = TypeVar("Rule", bound="Callable[..., Any]")


@dataclass(frozen=True)
class Traits:
    """Facts about a registered rule: warnings, recommendations, documentation, tests and benchmarks read them here only.

    Attributes:
        sees: Gradient balancers only: whether the rule maps a Gramian (K, K) to weights (K,) or a Jacobian (K, P) to a
            direction (P,).
        heads: Gradient balancers only: whether the method's paper code multiplies the loss of a task-specific head with the
            task's weight.
        ignores_weights: Gradient balancers only: True if positive weights of the losses do not change the step, heads
            included. The stage then warns of a loss balancer that has no effect.
        label: The method's name in its paper and in published tables, such as ``"PCGrad"``.
        paper: Authors, year and web address, such as ``"Yu et al. 2020, https://arxiv.org/abs/2001.06782"``; several are
            separated by semicolons.
        remedies: Problems of multi-task training that the method addresses.
        needs: Conditions that training must meet, beyond a call at each step.
        invariances: Names of the claims of `balance.testing` about scaling, order and rotation that the method satisfies.
        certificate: Gradient balancers with exact solutions: a function of the Gramian (K, K) and of the weights (K,) under
            default options. It returns the relative error of the weights in the method's optimality conditions.
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

    rule: Callable[..., object]  # the rule itself, or the class whose instances are rules
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

    def build(self, name: str, **options: Any) -> Callable[..., Tensor]:
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
        num_tasks = options.pop("num_tasks", None)
        self._check_options(name, options)
        if "num_tasks" in parameters(rule):
            if not isinstance(num_tasks, int) or num_tasks < 1:
                raise TypeError(
                    f"The {self.kind} '{name}' has state: build it with num_tasks=K, an int >= 1, but got {num_tasks!r}."
                )
            options["num_tasks"] = num_tasks
        if not inspect.isclass(rule):
            function = cast("Callable[..., Tensor]", rule)
            return functools.partial(function, **options) if options else function
        built = cast("Callable[..., Tensor]", rule(**options))
        if isinstance(built, nn.Module):
            options.pop("num_tasks", None)
            vars(built)["registered_as"] = describe(name, options)
        return built

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options that a user may give to the rule called ``name``, annotations resolved to types."""
        return rule_options(self.method(name).rule)

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
                raise ValueError(unknown(self.kind, name, self.names()) + _other_kind(self, name))
            rule = entry_point.load()  # which may register itself
            if name not in self._methods:
                self.register(name)(rule)
        return self._methods[name]

    def _check_options(self, name: str, options: Mapping[str, Any]) -> None:
        known = self.options(name)
        for option, value in options.items():
            if option not in known:
                end = f".{suggestion(option, known)}" if known else "; it takes no options."
                raise ValueError(f"The {self.kind} '{name}' has no option '{option}'{end}")
            check_type(f"Option '{option}' of {self.kind} '{name}'", value, known[option].annotation)
        missing = [option for option, p in known.items() if p.default is p.empty and option not in options]
        if missing:
            raise TypeError(f"The {self.kind} '{name}' needs its option '{missing[0]}', which has no default.")

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {e.name: e for e in entry_points(group=self.group)}


def _other_kind(registry: Registry, name: str) -> str:
    """Return the end of a message about an unknown name, if the name is a rule of the other kind; else nothing."""
    for other in (loss_balancers, gradient_balancers):
        if other is not registry and name in other:
            return f" '{name}' is a {other.kind}."
    return ""


loss_balancers = Registry("loss balancer", "balance.loss_balancers")
gradient_balancers = Registry("gradient balancer", "balance.gradient_balancers")
