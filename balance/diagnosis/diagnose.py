"""Diagnosis of a problem before a method is chosen: conflict and scale of its tasks, cost of each method, recommendation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..engine.partition import read_shared
from ..messages import unknown
from ..profiling import Cost
from ..rules.registry import Registry, gradient_balancers, loss_balancers
from . import text
from .advice import Advice, advise
from .findings import find_problems
from .measurement import Measurement
from .recommendation import recommend
from .restore import Restoration
from .statistics import Price, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Batch = TypeVar("Batch")


def diagnose(
    losses: Callable[[Batch], Mapping[str, Tensor]],
    batches: Iterable[Batch],
    *,
    model: nn.Module,
    shared: Iterable[Tensor],
    num_batches: int = 16,
    steps: int = 50,
    lr: float = 1e-3,
    loss_methods: Iterable[str] | None = None,
    gradient_methods: Iterable[str] | None = None,
) -> Diagnosis:
    """Measure losses and task gradients of a few batches before and after a little training, and the price of each method.

    The training is by Adam on the plain sum of the losses, over the same batches again and again. The model is restored on
    exit, also after an error: parameters, buffers, extra state, ``.grad``, ``requires_grad`` and modes. Torch's global random
    state is restored too. The model is measured in its present mode: put it in training mode.

    A price covers forward, `Balancer.backward` and, if a method needs it, the observation, without the optimizer. It does not
    cover work that a method does only later in training: igbv2 trains its agent from the fourth epoch on.

    Args:
        losses: Function of a batch that returns the K losses of the model: scalars by task, every task at every batch.
        batches: Batches of the usual size, on the device of the model; the first ``num_batches`` are taken.
        model: Module that contains every module that ``losses`` calls; all its parameters are trained.
        shared: Parameters that the tasks share, as for `Balancer.backward`.
        num_batches: At least 2, since only the spread over batches distinguishes conflict from noise.
        steps: Steps of training between the two measurements.
        lr: Learning rate of that training.
        loss_methods: Loss balancers to price, next to ls; None for all.
        gradient_methods: Gradient balancers to price; None for all.

    Returns:
        A record that prints as a report.

    Raises:
        ValueError: If there are fewer than two batches or tasks, or a task is missing. If a name is unknown or a number is
            out of range. If a loss or gradient is not finite.
        TypeError: If an argument has the wrong type.
    """
    _check_numbers(num_batches, steps, lr)
    loss_names = [name for name in _names(loss_balancers, "loss_methods", loss_methods) if name != "ls"]  # the plain step
    gradient_names = _names(gradient_balancers, "gradient_methods", gradient_methods)
    parameters = _read(losses, batches, model, shared)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), torch.enable_grad(), Restoration(model, parameters) as restoration:
        taken = _first(batches, num_batches)
        measurement = Measurement(losses, _tasks(losses(taken[0])), taken, parameters, restoration)
        start = measurement.statistics()
        measurement.train(model, steps, lr)
        end = measurement.statistics()
        stages = [measurement.loss_stage(name, [*start.losses, *end.losses]) for name in loss_names]
        stages += [measurement.gradient_stage(name) for name in gradient_names]
        baseline, prices = measurement.prices(stages)
    loss_prices = dict(zip(loss_names, prices[: len(loss_names)], strict=True))
    gradient_prices = dict(zip(gradient_names, prices[len(loss_names) :], strict=True))
    sizes = sum(parameter.numel() for parameter in parameters), len(taken), steps, lr
    recommendation = recommend(start, end, (loss_balancers, gradient_balancers), (loss_prices, gradient_prices))
    advice = advise(find_problems(start, end), len(start.tasks))
    return Diagnosis(start.tasks, *sizes, start, end, baseline, loss_prices, gradient_prices, *recommendation, advice)


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Record of a diagnosis; printed, it is a report.

    Attributes:
        tasks: K names.
        parameters: Number P of shared parameters.
        batches: Number B of measured batches.
        steps: Steps of training between the two measurements.
        lr: Learning rate of that training.
        start: Statistics before the training.
        end: Statistics after it.
        baseline: Cost of a plain step: equal weights and one ordinary backward pass.
        loss_prices: Prices of the loss balancers, without a gradient balancer.
        gradient_prices: Prices of the gradient balancers, with equal weights of the losses.
        recommendation: Sentences: methods to compare, and the reasons.
        loss_methods: Loss balancers that are worth comparing with equal weights.
        gradient_methods: Gradient balancers that are worth comparing with none.
        advice: The pair of methods to begin with.
    """

    tasks: tuple[str, ...]
    parameters: int
    batches: int
    steps: int
    lr: float
    start: Statistics
    end: Statistics
    baseline: Cost
    loss_prices: Mapping[str, Price]
    gradient_prices: Mapping[str, Price]
    recommendation: tuple[str, ...]
    loss_methods: tuple[str, ...]
    gradient_methods: tuple[str, ...]
    advice: Advice

    def as_dict(self) -> dict[str, Any]:
        """Return the record as dicts, lists, strings and finite numbers, for JSON."""
        plain = ("parameters", "batches", "steps", "lr")
        lists = ("tasks", "recommendation", "loss_methods", "gradient_methods")
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: list(getattr(self, name)) for name in lists},
            "start": self.start.as_dict(),
            "end": self.end.as_dict(),
            "baseline": self.baseline._asdict(),
            "loss_prices": {name: price.as_dict() for name, price in self.loss_prices.items()},
            "gradient_prices": {name: price.as_dict() for name, price in self.gradient_prices.items()},
            "advice": self.advice._asdict(),
        }

    def __str__(self) -> str:
        return "\n\n".join(
            [
                text.title(len(self.tasks), self.parameters, self.batches, self.steps, self.lr),
                text.losses(self.start, self.end),
                text.gradients(self.start, self.end),
                text.cosines(self.start, self.end),
                text.costs(self.baseline, self.loss_prices, self.gradient_prices),
                text.recommendation((str(self.advice), *self.recommendation)),
            ]
        )


def _read(losses: object, batches: object, model: object, shared: Iterable[Tensor]) -> list[Tensor]:
    """Return the shared parameters, after a check of all arguments."""
    if not callable(losses):
        raise TypeError(f"losses must be a callable, batch -> dict of losses by task, but got {type(losses).__name__}.")
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, but got {type(batches).__name__}. Use for example a DataLoader."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}.")
    parameters = read_shared(shared)
    if not parameters:
        raise ValueError("shared must hold a parameter that requires a gradient, but all are frozen.")
    return parameters


def _check_numbers(num_batches: int, steps: int, lr: float) -> None:
    for name, value, least in (("num_batches", num_batches, 2), ("steps", steps, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int, at least {least}, but got {value!r}.")
    if not lr > 0:
        raise ValueError(f"lr must be positive, but got {lr}.")


def _names(registry: Registry, argument: str, names: Iterable[str] | None) -> tuple[str, ...]:
    if names is None:
        return registry.names()
    if isinstance(names, str):
        raise TypeError(f"{argument} must be several names, but got {names!r}. Use ({names!r},).")
    names = tuple(names)
    for name in names:
        if name not in registry:
            raise ValueError(unknown(registry.kind, name, registry.names()))
    return names


def _first(batches: Iterable[Any], count: int) -> list[Any]:
    taken = list(itertools.islice(batches, count))
    if len(taken) < 2:
        raise ValueError(
            "batches must contain at least two, since only their spread distinguishes conflict from noise, but got "
            f"{len(taken)}. If it is an iterator that was used up, give a list."
        )
    return taken


def _tasks(losses: object) -> tuple[str, ...]:
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must return a dict of losses by task, but got {type(losses).__name__}. Use {{name: loss}}.")
    if len(losses) < 2:
        raise ValueError(f"losses must return at least two tasks, but got {list(losses)}. There is nothing to balance.")
    return tuple(losses)
