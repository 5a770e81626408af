"""Record of a study: what each method reached on each problem, as one JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from balance.comparison.statistics import Estimate
from balance.comparison.tables import json_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from balance.types import Remedy

SHIPPED = Path(__file__).with_name("which_method.json")  # the recorded study of the documentation
PLAIN = "ls"  # the method without a balancer, to which times are relative


@dataclass(frozen=True)
class MethodResult:
    """A method on a problem.

    Attributes:
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or None.
        delta_m: Test value in percent by seed, of the chosen trial; infinity for a failed seed. Empty if no trial finished.
        failed: Number of seeds, and of trials, without a finished run.
        chosen: Settings of the chosen trial, such as ``train.lr=0.01``.
        scores: Validation score of each trial; None for a failed one.
        step_seconds: Time of a training step; None if it fails.
    """

    loss_method: str
    gradient_method: str | None
    delta_m: Mapping[int, float]
    failed: int = 0
    chosen: tuple[str, ...] = ()
    scores: tuple[float | None, ...] = ()
    step_seconds: float | None = None

    @property
    def estimate(self) -> Estimate:
        """Mean and 95 % interval over seeds."""
        return Estimate(dict(self.delta_m))

    @property
    def best_trial(self) -> int | None:
        """Number of the chosen trial, from 0; None if no trial finished."""
        scores = [math.inf if score is None else score for score in self.scores]
        return scores.index(min(scores)) if any(map(math.isfinite, scores)) else None

    @property
    def mean(self) -> float:
        """Mean over seeds; infinity if a value is not finite, or no run finished."""
        return self.estimate.mean if self.delta_m and math.isfinite(self.estimate.mean) else math.inf


@dataclass(frozen=True)
class ProblemResult:
    """All methods on a problem.

    Attributes:
        experiment: Name of the experiment.
        overrides: Entries of the trainer's configuration of all runs.
        reference: Networks with which delta_m compares, in words.
        methods: Results by method.
        diagnosis: Numbers of a diagnosis before training, by name.
        findings: Problems that the diagnosis found, as remedies are named.
    """

    experiment: str
    overrides: tuple[str, ...]
    reference: str
    methods: Mapping[str, MethodResult]
    diagnosis: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Remedy, ...] = ()

    @property
    def best(self) -> float:
        """Smallest mean delta_m."""
        return min(result.mean for result in self.methods.values())


@dataclass(frozen=True)
class StudyRecord:
    """Results of a study.

    Attributes:
        seeds: Seeds of each chosen trial.
        rates: Factor of the learning rate in each trial.
        problems: Results by problem.
    """

    seeds: int
    rates: tuple[float, ...]
    problems: Mapping[str, ProblemResult]

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(next(iter(self.problems.values())).methods)

    @property
    def trials(self) -> int:
        """Number of trials of each method on each problem."""
        return len(self.rates)

    def table(self) -> NDArray[np.float64]:
        """Return mean delta_m. Shape (problems, methods); infinity where a method failed."""
        return np.array([[p.methods[name].mean for name in self.methods] for p in self.problems.values()])

    def times(self) -> dict[str, float]:
        """Return the geometric mean over problems of the time of a step relative to equal weights, by method."""
        return {name: _geometric_mean([_relative_time(p, name) for p in self.problems.values()]) for name in self.methods}

    def write(self, file: Path) -> None:
        """Write the record as JSON, with null for numbers that are not finite."""
        file.write_text(json_text(asdict(self)), encoding="utf-8")


def read_record(file: Path = SHIPPED) -> StudyRecord:
    """Read a record.

    Returns:
        The record.

    Raises:
        ValueError: If the file cannot be read, or has another form.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        problems = {name: _problem(values) for name, values in content["problems"].items()}
        return StudyRecord(content["seeds"], tuple(content["rates"]), problems)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} must be a record that experiments/study.py wrote, but: {error!r}") from None


def _problem(content: dict[str, Any]) -> ProblemResult:
    methods = {name: _method(values) for name, values in content.pop("methods").items()}
    overrides, findings = tuple(content.pop("overrides")), tuple(content.pop("findings"))
    return ProblemResult(**content, methods=methods, overrides=overrides, findings=findings)


def _method(content: dict[str, Any]) -> MethodResult:
    drops = {int(seed): math.inf if value is None else value for seed, value in content.pop("delta_m").items()}
    chosen, scores = tuple(content.pop("chosen")), tuple(content.pop("scores"))
    return MethodResult(**content, delta_m=drops, chosen=chosen, scores=scores)


def _relative_time(problem: ProblemResult, name: str) -> float:
    time, plain = problem.methods[name].step_seconds, problem.methods[PLAIN].step_seconds
    return time / plain if time is not None and plain is not None else math.nan


def _geometric_mean(numbers: list[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan
