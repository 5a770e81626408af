"""Diagnosis before choosing: how the tasks of a problem disagree, what each method costs there, what to compare."""

from __future__ import annotations

import itertools
import math
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from balance.diagnosis.recommendation import advise, number, quoted
from balance.diagnosis.restore import AsFound
from balance.diagnosis.statistics import Look, Price, median, ratio
from balance.engine.graph import leaves
from balance.engine.partition import read_shared
from balance.messages import unknown
from balance.profiling import Cost, measure
from balance.rules.registry import Registry, gradient_balancers, loss_balancers
from balance.stage.balancer import Balancer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from balance.stage.report import Report
    from balance.types import Gramian, Weights

Batch = TypeVar("Batch")
Outcome = TypeVar("Outcome")

_ROUNDS, _SECONDS = 12, 20  # in which each method is timed, and after which no further one begins
_REPEATS, _BUDGET = 3, 0.1  # timed steps in a round, and seconds after which no further one begins
_WIDTH, _NAME, _PAIRS = 100, 20, 15  # of the report: columns, letters of a task, pairs of tasks


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
    """Look at the losses and the task gradients of a few batches, before and after a little training, and price each method.

    The training is by Adam on the plain sum of the losses, over the same batches again and again. Whatever happens, the
    parameters, buffers, ``.grad``, ``requires_grad`` and modes of the model and torch's global random state are in the end what
    they were. The model is looked at in the mode in which it is: put it in training mode.

    A price is that of forward, `Balancer.backward` and, where a method needs it, the observation, without the optimizer. What a
    method does only later in training (igbv2 trains its agent from the fourth epoch on) is not in it.

    Args:
        losses: Computes the K losses of a batch with the model: scalars by task, every task at every batch.
        batches: Batches of the usual size, on the device of the model; the first ``num_batches`` are taken.
        model: Holds every module that ``losses`` calls; all its parameters are trained.
        shared: Parameters that the tasks share, as for `Balancer.backward`.
        num_batches: At least 2, since it is the spread over batches that tells conflict from noise.
        steps: Steps of training between the two looks.
        lr: Learning rate of that training.
        loss_methods: Loss balancers to price beside ls; None for all.
        gradient_methods: Gradient balancers to price; None for all.

    Raises:
        ValueError: If there are fewer than two batches or tasks, a task is missing, a name is unknown, a number is out of
            range, or a loss or gradient is not finite.
        TypeError: If an argument is not what it should be.
    """
    _check_numbers(num_batches, steps, lr)
    of_losses = [
        name for name in _names(loss_balancers, "loss_methods", loss_methods) if name != "ls"
    ]  # that is the plain step
    of_gradients = _names(gradient_balancers, "gradient_methods", gradient_methods)
    parameters = _read(losses, batches, model, shared)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), torch.enable_grad(), AsFound(model, parameters) as found:
        problem = _Problem(losses, _first(batches, num_batches), parameters, found)
        start = problem.look()
        problem.train(model, steps, lr)
        end = problem.look()
        stages = [problem.stage_with_loss(name, [*start.losses, *end.losses]) for name in of_losses]
        stages += [problem.stage_with_gradient(name) for name in of_gradients]
        baseline, prices = problem.prices(stages)
    loss_prices = dict(zip(of_losses, prices[: len(of_losses)], strict=True))
    gradient_prices = dict(zip(of_gradients, prices[len(of_losses) :], strict=True))
    return Diagnosis(
        problem.tasks,
        sum(parameter.numel() for parameter in parameters),
        len(problem.batches),
        steps,
        lr,
        start,
        end,
        baseline,
        loss_prices,
        gradient_prices,
        *advise(start, end, loss_prices, gradient_prices),
    )


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; printed, it is a report.

    Attributes:
        tasks: K names.
        parameters: Number P of shared parameters.
        batches: Number B of batches that were looked at.
        steps: Steps of training between the two looks.
        lr: Learning rate of that training.
        start: The look before it.
        end: The look after it.
        baseline: Cost of a plain step: equal weights and one ordinary backward pass.
        loss_prices: By loss balancer, without a gradient balancer.
        gradient_prices: By gradient balancer, with equal weights of the losses.
        recommendation: Sentences: what to compare, and why.
        loss_methods: Loss balancers that are worth comparing with equal weights.
        gradient_methods: Gradient balancers that are worth comparing with none.
    """

    tasks: tuple[str, ...]
    parameters: int
    batches: int
    steps: int
    lr: float
    start: Look
    end: Look
    baseline: Cost
    loss_prices: Mapping[str, Price]
    gradient_prices: Mapping[str, Price]
    recommendation: tuple[str, ...]
    loss_methods: tuple[str, ...]
    gradient_methods: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, strings and finite numbers, for JSON."""
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
        }

    def __str__(self) -> str:
        title = (
            f"{len(self.tasks)} tasks on {self.parameters} shared parameters, seen on {self.batches} batches before and after "
            f"{self.steps} steps of Adam on the plain sum of the losses (learning rate {self.lr:g})."
        )
        advice = [
            textwrap.fill(sentence, _WIDTH, initial_indent=f"{n}. ", subsequent_indent="   ")
            for n, sentence in enumerate(self.recommendation, start=1)
        ]
        parts = (textwrap.fill(title, _WIDTH), self._losses(), self._gradients(), self._cosines(), self._prices())
        return "\n\n".join([*parts, "\n".join(["What to compare, and why", *advice])])

    def _losses(self) -> str:
        looks = (self.start.losses, self.end.losses)
        columns = [column for values in looks for column in (median(values), values.amin(dim=0), values.amax(dim=0))]
        ratios = [cell for values in looks for cell in (number(ratio(values)), "", "")]
        header = ["LOSS", "before", "least", "largest", "after", "least", "largest"]
        return _table(
            header, [*self._by_task(columns), ["largest / smallest", *ratios]], "Median, least and largest of the batches."
        )

    def _gradients(self) -> str:
        values = [self.start.norms, self.end.norms, self.start.relative_norms, self.end.relative_norms]
        shares = [[_percent(share) for share in look.shares.tolist()] for look in (self.start, self.end)]
        rows = [
            [*row, *percent] for row, percent in zip(self._by_task(map(median, values)), zip(*shares, strict=True), strict=True)
        ]
        rows.append(["longest / shortest", *(number(ratio(v)) for v in values), "", ""])
        header = ["GRADIENT LENGTH", "before", "after", "per loss: before", "after", "share: before", "after"]
        note = "On the shared parameters, median of the batches; divided by the loss; share in the plain sum of the gradients."
        return _table(header, rows, note)

    def _cosines(self) -> str:
        pairs = list(zip(self.start.pairs, self.end.pairs, strict=True))
        shown = pairs if len(pairs) <= _PAIRS else sorted(pairs, key=lambda pair: pair[1].mean)[:_PAIRS]
        rows = [
            [
                " - ".join(map(_name, old.tasks)),
                *(f"{p.mean:+.2f} ± {p.spread:.2f}" for p in (old, new)),
                old.reading,
                new.reading,
            ]
            for old, new in shown
        ]
        if len(shown) < len(pairs):
            rows.append([f"({len(pairs) - len(shown)} more, less negative)", "", "", "", ""])
        rows.append(["share below 0", *(f"{100 * look.conflict_share:.0f} %" for look in (self.start, self.end)), "", ""])
        note = "Between the gradients of two tasks: mean ± standard deviation over the batches. Noise: the sign is not stable."
        return _table(["COSINE", "before", "after", "reading: before", "after"], rows, note)

    def _prices(self) -> str:
        plain = [f"{1000 * self.baseline.seconds:.3g} ms", f"{self.baseline.bytes / 2**20:.3g} MiB"]
        rows, reasons = [["plain step", *plain, ""]], []
        for kind, prices in (("losses", self.loss_prices), ("gradients", self.gradient_prices)):
            for name, price in prices.items():
                if price.cost is None:
                    reasons.append(textwrap.fill(f"{name} does not run: {price.reason}", _WIDTH, subsequent_indent="   "))
                else:
                    rows.append([name, f"{price.time:.1f} x", f"{price.memory:.1f} x", kind])
        note = "Forward, backward and balancing, without the optimizer; memory beside the model and the batch, at its peak."
        return "\n".join([_table(["COST OF A STEP", "time", "memory", "balances"], rows, note), *reasons])

    def _by_task(self, columns: Iterable[Tensor]) -> list[list[str]]:
        rows = zip(self.tasks, *(column.tolist() for column in columns), strict=True)
        return [[_name(task), *map(number, row)] for task, *row in rows]


class _Problem:
    """The user's losses on the batches that are looked at."""

    def __init__(self, losses: Callable[[Any], Any], batches: Sequence[Any], shared: Sequence[Tensor], found: AsFound) -> None:
        self.losses = losses
        self.batches = batches
        self.shared = shared
        self.found = found
        self.tasks = _tasks(losses(batches[0]))

    def look(self) -> Look:
        """One backward pass per task and batch."""
        stage = Balancer(self.tasks, gradient=_equal)
        losses, gramians, cosines = [], [], []
        for k in range(len(self.batches)):
            report = self.backward(stage, k, adopt=True)
            self.found.clear()
            assert report.gramian is not None
            assert report.cosines is not None
            losses.append(report.losses.cpu().double())
            gramians.append(report.gramian)
            cosines.append(report.cosines)
        return Look(self.tasks, torch.stack(losses), torch.stack(gramians), torch.stack(cosines))

    def train(self, model: nn.Module, steps: int, lr: float) -> None:
        """Adam on the plain sum of the losses."""
        parameters = {id(p): p for p in (*model.parameters(), *self.shared) if p.requires_grad}
        optimizer = torch.optim.Adam(parameters.values(), lr)
        stage = Balancer(self.tasks)
        for step in range(steps):
            self.backward(stage, step % len(self.batches), adopt=False)
            optimizer.step()
            self.found.clear()

    def backward(self, stage: Balancer, k: int, *, adopt: bool) -> Report:
        """Forward and backward of batch ``k``; ``adopt``: take every leaf that the losses reach into care."""
        losses = self.losses(self.batches[k])
        missing = [task for task in self.tasks if task not in losses]
        if missing:
            raise ValueError(
                f"losses must return every task for every batch, but for batch {k} {quoted(missing)} are missing. Choose "
                "batches that have all tasks."
            )
        if adopt:
            self.found.adopt(leaves(loss for loss in losses.values() if isinstance(loss, torch.Tensor)))
        return stage.backward(losses, shared=self.shared)

    def cost(self, stage: Balancer) -> Cost:
        """Cost of a step on the first batch, observation included."""

        def step() -> None:
            stage.backward(self.losses(self.batches[0]), shared=self.shared)
            if stage.needs_observation:
                with torch.no_grad():
                    stage.observe(self.losses(self.batches[0]))
            stage.zero_grad()
            self.found.clear()

        return measure(step, repeats=_REPEATS, budget=_BUDGET, device=self.shared[0].device)

    def stage_with_loss(self, name: str, seen: Iterable[Tensor]) -> Balancer | str:
        """A stage with a loss balancer, or why that cannot stand all the losses that were seen. Shapes (K,)."""

        def tried() -> Balancer:
            trial = Balancer(self.tasks, loss=name)
            for losses in seen:
                trial.backward(losses.clone().requires_grad_())
            return Balancer(self.tasks, loss=name)

        return self._attempt(tried)

    def stage_with_gradient(self, name: str) -> Balancer | str:
        """A stage with a gradient balancer, or why there is none."""
        return self._attempt(lambda: Balancer(self.tasks, gradient=name))

    def prices(self, stages: Sequence[Balancer | str]) -> tuple[Cost, list[Price]]:
        """Cost of a plain step, and prices of others beside it.

        All are measured in turns, and the quickest counts, since a machine that is busy elsewhere makes steps longer only.
        """
        plain = Balancer(self.tasks)
        baselines: list[Cost] = []
        rounds: list[list[Cost | str]] = []
        begin = time.perf_counter()
        for _ in range(_ROUNDS):
            baselines.append(self.cost(plain))
            rounds.append(
                [self._attempt(partial(self.cost, stage)) if isinstance(stage, Balancer) else stage for stage in stages]
            )
            if baselines[0].seconds >= _BUDGET or time.perf_counter() - begin >= _SECONDS:
                break  # such a long step, or such a long round of them, is timed well enough
        baseline = _least(baselines)
        return baseline, [_price(outcomes, baseline) for outcomes in zip(*rounds, strict=True)]

    def _attempt(self, attempt: Callable[[], Outcome]) -> Outcome | str:
        try:
            return attempt()
        except Exception as error:  # noqa: BLE001 - whatever stops a method here is the reason not to choose it
            self.found.clear()
            return str(error).partition("\n")[0] or type(error).__name__


def _equal(gramian: Gramian) -> Weights:
    return torch.ones_like(gramian[0])


def _least(costs: Sequence[Cost]) -> Cost:
    return Cost(min(cost.seconds for cost in costs), max(cost.bytes for cost in costs))


def _price(outcomes: Sequence[Cost | str], baseline: Cost) -> Price:
    for outcome in outcomes:
        if isinstance(outcome, str):
            return Price(None, math.nan, math.nan, outcome)
    cost = _least([outcome for outcome in outcomes if isinstance(outcome, Cost)])
    return Price(cost, cost.seconds / baseline.seconds, cost.bytes / baseline.bytes if baseline.bytes else math.nan)


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f} %" if math.isfinite(share) else "-"  # 0.0 makes an end of -0.0


def _name(task: str) -> str:
    return task if len(task) <= _NAME else f"{task[: _NAME - 1]}…"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Columns that are flush right but for the first, and a note below."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for first, *rest in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], textwrap.fill(note, _WIDTH)])


def _read(losses: object, batches: object, model: object, shared: Iterable[Tensor]) -> list[Tensor]:
    """The shared parameters, all arguments checked."""
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


def _names(registry: Registry, what: str, names: Iterable[str] | None) -> tuple[str, ...]:
    if names is None:
        return registry.names()
    if isinstance(names, str):
        raise TypeError(f"{what} must be several names, but got {names!r}. Use ({names!r},).")
    names = tuple(names)
    for name in names:
        if name not in registry:
            raise ValueError(unknown(registry.kind, name, registry.names()))
    return names


def _first(batches: Iterable[Any], count: int) -> list[Any]:
    taken = list(itertools.islice(batches, count))
    if len(taken) < 2:
        raise ValueError(
            f"batches must hold at least two, since their spread tells conflict from noise, but got {len(taken)}. Is it an "
            "iterator that was used up?"
        )
    return taken


def _tasks(losses: object) -> tuple[str, ...]:
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must return a dict of losses by task, but got {type(losses).__name__}. Use {{name: loss}}.")
    if len(losses) < 2:
        raise ValueError(f"losses must return at least two tasks, but got {list(losses)}. There is nothing to balance.")
    return tuple(losses)
