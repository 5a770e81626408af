"""A study in a YAML file: methods, problems, and the budget for tuning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from balance.config import compose
from balance.messages import unknown
from experiments.config.keys import check_keys
from experiments.studies.record import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SHIPPED = Path(__file__).with_name("which_method.yaml")


@dataclass
class MethodEntry:
    """A method, and the options that its trials try.

    Attributes:
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or None.
        search: Values of an option by dotted key. Trial t takes value t, from the first again after the last. None leaves the
            option as the problem sets it.
        random_weights: Whether each trial draws weights of the tasks, as the option ``loss.weights``.
    """

    loss_method: str = "ls"
    gradient_method: str | None = None
    search: dict[str, list[Any]] = field(default_factory=dict)
    random_weights: bool = False


@dataclass
class ProblemEntry:
    """An experiment with settings of its trainer.

    Attributes:
        experiment: Name of the experiment.
        overrides: Entries of the trainer's configuration for all runs.
        metrics: Test metrics that are judged, such as ``left/accuracy``; none for all.
        average: Whether the mean of the metrics is judged, where some can be zero.
        reference: Method with whose metrics delta_m compares; None for single-task networks.
    """

    experiment: str = "digits"
    overrides: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    average: bool = False
    reference: str | None = None


@dataclass
class SmallEntry:
    """Budget of the small version."""

    seeds: int = 2
    baseline_seeds: int = 1
    rates: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class Study:
    """Methods with equal budgets on several problems.

    Attributes:
        seeds: Number of seeds with which the chosen setting of a method is trained: 0, 1, ...
        tuning_seed: Seed of all trials, which is none of the seeds.
        baseline_seeds: Number of seeds of the single-task networks.
        rates: Factor of the problem's learning rate for each trial.
        methods: Methods by name in tables.
        problems: Problems by name in tables.
        small: Budget of the small version.
    """

    seeds: int = 5
    tuning_seed: int = 100
    baseline_seeds: int = 1
    rates: list[float] = field(default_factory=lambda: [1.0])
    methods: dict[str, MethodEntry] = field(default_factory=dict)
    problems: dict[str, ProblemEntry] = field(default_factory=dict)
    small: SmallEntry = field(default_factory=SmallEntry)


def read_study(file: Path) -> Study:
    """Read a study, and check its form.

    Returns:
        The study.

    Raises:
        ValueError: If the file cannot be read, a key, a type or a number is wrong, or methods or problems are missing.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        check_keys(content, Study, "the file")
        for kind, entry in (("methods", MethodEntry), ("problems", ProblemEntry)):
            for name, values in content.get(kind, {}).items():
                check_keys(values, entry, f"{kind} '{name}'")
        study = _study(compose(Study, content, ()))
        _check_numbers(study)
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must be a YAML file with a study, but: {error}") from None
    return study


def small_version(study: Study) -> Study:
    """Return the study with the small budget."""
    return replace(study, seeds=study.small.seeds, baseline_seeds=study.small.baseline_seeds, rates=study.small.rates)


def with_problems(study: Study, names: Iterable[str]) -> Study:
    """Return the study with some of its problems only.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names:
        if name not in study.problems:
            raise ValueError(unknown("problem of the study", name, study.problems))
    return replace(study, problems={name: study.problems[name] for name in names})


def _study(config: Any) -> Study:
    """Return plain dataclasses from the typed configuration."""
    methods = {str(name): _method(entry) for name, entry in config.methods.items()}
    problems = {
        str(name): ProblemEntry(e.experiment, list(e.overrides), list(e.metrics), e.average, e.reference)
        for name, e in config.problems.items()
    }
    small = SmallEntry(config.small.seeds, config.small.baseline_seeds, list(config.small.rates))
    numbers = (config.seeds, config.tuning_seed, config.baseline_seeds, list(config.rates))
    return Study(*numbers, methods, problems, small)


def _method(entry: Any) -> MethodEntry:
    search = {str(key): list(values) for key, values in entry.search.items()}
    return MethodEntry(entry.loss_method, entry.gradient_method, search, entry.random_weights)


def _check_numbers(study: Study) -> None:
    if len(study.methods) < 2 or not study.problems:
        raise ValueError(f"it has {len(study.methods)} methods and {len(study.problems)} problems. Give at least two and one.")
    if PLAIN not in study.methods:
        raise ValueError(f"methods must have {PLAIN}, since times are relative to it, but got {', '.join(study.methods)}.")
    for budget in (study, study.small):
        if min(budget.seeds, budget.baseline_seeds, len(budget.rates)) < 1 or min(budget.rates) <= 0:
            raise ValueError("seeds, baseline_seeds and rates must be positive, with at least one rate.")
        if study.tuning_seed < budget.seeds:
            raise ValueError(
                f"tuning_seed must be at least seeds={budget.seeds}, so that no seed is both, but got {study.tuning_seed}."
            )
    _check_references(study.methods, study.problems)


def _check_references(methods: Mapping[str, MethodEntry], problems: Mapping[str, ProblemEntry]) -> None:
    for problem in problems.values():
        if problem.reference is not None and problem.reference not in methods:
            raise ValueError(unknown("reference", problem.reference, methods))
