"""Recommendation of methods to compare: registered methods that remedy the problems which the statistics show."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .findings import find_problems, quoted
from .statistics import median

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..rules.registry import Registry, Traits
    from ..types import Need, Remedy
    from .findings import Finding
    from .statistics import Price, Statistics

EXPENSIVE = 2.0  # times a plain step: reusing weights, or measuring at the features, then saves half of the cost or more
REUSING_STEPS = 10  # steps that use the same weights: nine of ten then cost a plain step
FEW = 3  # methods of each kind that are recommended against a problem

CONDITIONS: dict[Need, str] = {
    "positive losses": "positive losses",
    "optimizer": "its parameters in the optimizer",
    "observe": "observe() after every optimizer step",
    "end_epoch": "end_epoch() once per epoch",
    "validation": "observe_validation() with losses of validation data every few steps",
    "all tasks": "all tasks at every step",
    "parameters": "source='parameters'",
}


class Candidate(NamedTuple):
    """A registered method, with its price if it was priced."""

    name: str
    traits: Traits
    price: Price | None


class Recommendation(NamedTuple):
    """Sentences, and the names of the methods to compare."""

    sentences: tuple[str, ...]
    loss_methods: tuple[str, ...]
    gradient_methods: tuple[str, ...]


class Candidates:
    """The methods of one registry, the best first.

    Methods that address more of the problems come first, then cheaper ones. A method is usable if it was priced, runs and
    trains the shared parameters. A method that needs positive losses is not usable if some were not positive.

    Args:
        registry: Registered methods. Entry points that cannot be imported are left out.
        prices: Prices by name.
        problems: Problems that the statistics show.
        negative: Tasks whose losses were not always positive.
    """

    def __init__(
        self, registry: Registry, prices: Mapping[str, Price], problems: Sequence[Remedy], negative: Sequence[str]
    ) -> None:
        self.kind = registry.kind
        self.problems = problems
        self.methods = _importable(registry, prices)
        priced = [(candidate, price) for candidate in self.methods if (price := candidate.price) is not None and price.usable]
        priced.sort(key=lambda pair: (-self.addressed(pair[0]), round(pair[1].time, 1), pair[0].name))
        self.usable = [candidate for candidate, _ in priced if not (negative and "positive losses" in candidate.traits.needs)]

    def against(self, problem: Remedy) -> list[Candidate]:
        """Return the usable methods against a problem."""
        return [candidate for candidate in self.usable if problem in candidate.traits.remedies]

    def recommended(self) -> list[Candidate]:
        """Return a few methods against each of the problems, each method once."""
        listed = [candidate for problem in self.problems for candidate in self.against(problem)[:FEW]]
        return list({candidate.name: candidate for candidate in listed}.values())

    def addressed(self, candidate: Candidate) -> int:
        """Return the number of the problems that a method addresses."""
        return len(set(self.problems).intersection(candidate.traits.remedies))


def recommend(
    start: Statistics, end: Statistics, registries: Sequence[Registry], prices: Sequence[Mapping[str, Price]]
) -> Recommendation:
    """Recommend methods to compare, with reasons.

    Args:
        start: Statistics before some training.
        end: Statistics after it, on which most of the recommendation rests.
        registries: Registry of the loss balancers, registry of the gradient balancers.
        prices: Prices by name, for each registry.

    Returns:
        Sentences, and the names of the recommended methods.
    """
    findings = find_problems(start, end)
    problems = [finding.problem for finding in findings if finding.present]
    lowest = torch.cat([start.losses, end.losses]).amin(dim=0).tolist()
    negative = [task for task, loss in zip(end.tasks, lowest, strict=True) if loss <= 0]
    both = [Candidates(registry, priced, problems, negative) for registry, priced in zip(registries, prices, strict=True)]
    loss_methods, gradient_methods = (candidates.recommended() for candidates in both)
    sentences = [
        *(_sentence(finding, both) for finding in findings),
        *([] if problems else ["Nothing here calls for a balancer: begin with equal weights."]),
        *_on_zero_gradients(end),
        *_on_negative_losses(negative, problems, both),
        *_on_conditions([*loss_methods, *gradient_methods]),
        *_on_pairing(loss_methods, gradient_methods),
        *_on_price(gradient_methods, len(end.tasks)),
        "This is a guess from the start of training. Only a comparison of finished runs over several seeds, with equal weights "
        "among them, can confirm it.",
    ]
    names = (tuple(candidate.name for candidate in methods) for methods in (loss_methods, gradient_methods))
    return Recommendation(tuple(sentences), *names)


def _importable(registry: Registry, prices: Mapping[str, Price]) -> list[Candidate]:
    candidates = []
    for name in registry.names():
        try:
            candidates.append(Candidate(name, registry.traits(name), prices.get(name)))
        except Exception:  # noqa: BLE001, S112 - a broken package of others must not end a diagnosis
            continue
    return candidates


def _sentence(finding: Finding, both: Sequence[Candidates]) -> str:
    """Return a finding, with the methods to compare if it is a problem."""
    if finding.present:
        return f"{finding.text}: {_comparison(finding.problem, both)}."
    superfluous = [c.name for candidates in both for c in candidates.against(finding.problem) if not candidates.addressed(c)]
    if finding.problem != "conflict" or not superfluous:
        return finding.text
    return f"{finding.text} Do not pay for a rule only because it repairs conflict ({_some(superfluous)})."


def _comparison(problem: Remedy, both: Sequence[Candidates]) -> str:
    """Return the methods to compare, in words."""
    parts = []
    for candidates in both:
        methods = candidates.against(problem)
        shown = methods[:FEW]
        if shown:
            times = ", ".join(f"{candidate.price.time:.1f}" for candidate in shown if candidate.price is not None)
            rest = f"; {len(methods) - FEW} more could help" if len(methods) > FEW else ""
            names = ", ".join(candidate.name for candidate in shown)
            parts.append(f"{candidates.kind}{'s' * (len(shown) > 1)} {names} ({times} times the time of a plain step{rest})")
    if parts:
        return f"compare {' and '.join(parts)}"
    others = [c.name for candidates in both for c in candidates.methods if problem in c.traits.remedies]
    if not others:
        return "no registered method addresses that"
    return f"methods such as {_some(others)} could help, but none of them was priced and trains here"


def _some(names: Sequence[str]) -> str:
    """Return the first names for a sentence, and the number of the others."""
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def _on_zero_gradients(end: Statistics) -> list[str]:
    zero = [task for task, norm in zip(end.tasks, median(end.norms).tolist(), strict=True) if norm == 0]
    return [f"The gradient of {quoted(zero)} is zero on the shared parameters: no rule can balance that."] if zero else []


def _on_negative_losses(negative: Sequence[str], problems: Sequence[Remedy], both: Sequence[Candidates]) -> list[str]:
    """Return the methods that are left out because they need positive losses."""
    listed = [candidate for candidates in both for candidate in candidates.methods if candidate.price is not None]
    needy = [c.name for c in listed if "positive losses" in c.traits.needs and set(problems).intersection(c.traits.remedies)]
    if not (negative and needy):
        return []
    return [
        f"The loss of {quoted(negative)} is not always positive, as {_some(needy)} need: give lower bounds (min_losses) to a "
        "rule that takes them."
    ]


def _on_conditions(methods: Sequence[Candidate]) -> list[str]:
    """Return the conditions that the recommended methods put on the training loop."""
    listed = [
        f"{candidate.name} ({', '.join(CONDITIONS[need] for need in candidate.traits.needs)})"
        for candidate in methods
        if candidate.traits.needs
    ]
    return [f"Conditions of these methods: {', '.join(listed)}."] if listed else []


def _on_pairing(loss_methods: Sequence[Candidate], gradient_methods: Sequence[Candidate]) -> list[str]:
    """Return the recommended gradient balancers on which a loss balancer has no effect."""
    ignorant = [candidate.name for candidate in gradient_methods if candidate.traits.ignores_weights]
    if not (loss_methods and ignorant):
        return []
    return [f"Compare {', '.join(ignorant)} without a loss balancer only: positive loss weights have no effect there."]


def _on_price(gradient_methods: Sequence[Candidate], num_tasks: int) -> list[str]:
    """Return a way to pay less for the first expensive gradient balancer."""
    for name, traits, price in gradient_methods:
        if price is not None and max(price.time, price.memory) >= EXPENSIVE:
            cost = f"{price.time:.1f} times the time and {price.memory:.1f} times the memory of a plain step"
            features = 'measure at the features in place of the parameters, source="features"'
            if traits.sees == "jacobian":  # without weights that could be used again
                return [f"If {cost} are too much for {name}, {features}."]
            reuse = f'gradient=compose.every({REUSING_STEPS}, "{name}", num_tasks={num_tasks})'
            return [f"If {cost} are too much, keep the weights of {name} for {REUSING_STEPS} steps, {reuse}, or {features}."]
    return []
