"""Training of a small network with a balancer, in steps that can fail, and copies of a training that continue it."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn

import balance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MACHINE = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
TASKS = ("a", "b", "c")
ROWS = 6
_PLACES = {task: k for k, task in enumerate(TASKS)}


class Setup(NamedTuple):
    """Options of a balancer, and whether there is a gradient scaler."""

    loss: Any = "ls"
    gradient: Any = None  # a name, None, or a pair of a composition and a name
    options: tuple[tuple[str, Any], ...] = ()
    scaler: bool = False

    def balancer(self, seed: int = 0) -> balance.Balancer:
        """Build the balancer."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return balance.Balancer(TASKS, self.loss, composed(self.gradient), seed=seed, **dict(self.options))


class Step(NamedTuple):
    """A step of training.

    Attributes:
        seed: Seed of the data.
        tasks: The tasks that are present.
        damage: Change of a task's loss: "zero", "nan", "inf", "overflow" (of its gradient only), "detached" (features).
        way: Methods of the balancer: "backward", "loss", "collect".
        micro: Number of micro-batches of "collect".
        skips: Whether the first task has no rows in the first micro-batch.
        factor: Factor on the gradients, a power of two.
        extra: Whether there is a further loss, a regulariser.
        measure: Whether conflict is measured on some parameters only.
        stacked: Whether the losses are given as one tensor, if all tasks are present.
        clear: Parameters whose ``.grad`` is set to None before: "all", "model" (not the balancer's), "none".
        update: Whether the optimizer makes its step.
        observe: Whether the losses are observed after the optimizer's step.
        trial: Whether `weights` is called first.
    """

    seed: int
    tasks: tuple[str, ...] = TASKS
    damage: tuple[tuple[str, str], ...] = ()
    way: str = "backward"
    micro: int = 2
    skips: bool = False
    factor: float = 1.0
    extra: bool = False
    measure: bool = False
    stacked: bool = False
    clear: str = "all"
    update: bool = True
    observe: bool = True
    trial: bool = False


def composed(gradient: Any) -> Any:
    """Build a gradient balancer from a name, or from a pair of a composition and a name."""
    if not isinstance(gradient, tuple):
        return gradient
    kind, name = gradient
    build: dict[str, Callable[[], Any]] = {
        "every": lambda: balance.compose.every(2, name, len(TASKS)),
        "smoothed": lambda: balance.compose.smoothed(name, 0.5, len(TASKS)),
        "grouped": lambda: balance.compose.grouped(name, [[0, 2], [1]], len(TASKS)),
        "smoothed every": lambda: balance.compose.smoothed(balance.compose.every(3, name, len(TASKS)), 0.7, len(TASKS)),
        "grouped every": lambda: balance.compose.grouped(balance.compose.every(2, name, 2), [[0], [1, 2]], len(TASKS)),
    }
    return build[kind]()


class Net(nn.Module):
    """A trunk with a frozen parameter, a head for each task, and a head that no task uses."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
            self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})
            self.unused = nn.Linear(2, 2)
        self.trunk[0].bias.requires_grad_(False)
        self.double()

    def features(self, step: Step, rows: Tensor) -> Tensor:
        """Return the features of some rows of the batch of a step."""
        return self.trunk(batch(step)[rows])

    def losses(
        self, step: Step, z: Tensor, own: dict[str, Tensor], views: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the mean losses of the tasks over their rows, given as positions among the rows of the features."""
        damage = dict(step.damage)
        return {
            task: _loss(self.heads[task], (views or {}).get(task, z)[rows], _PLACES[task], damage.get(task))
            for task, rows in own.items()
            if len(rows)
        }

    def regulariser(self) -> Tensor:
        """Return a loss of the trunk's parameters."""
        return 0.1 * torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum()


def batch(step: Step) -> Tensor:
    """Return the batch of a step. Shape (rows, inputs)."""
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step.seed), dtype=torch.float64)


def _loss(head: nn.Module, z: Tensor, place: int, damage: str | None) -> Tensor:
    if damage == "detached":
        z = z.detach()
    loss = (head(z) - place).square().mean() * 3.0**place + 0.1
    if damage == "zero":
        return loss * 0
    if damage in {"nan", "inf"}:
        return loss * float(damage)
    return loss + (loss * 0).sqrt() if damage == "overflow" else loss  # sqrt has an infinite derivative at zero


class Trainer:
    """A network, its balancer, an optimizer of both, and a gradient scaler if the setup has one."""

    def __init__(self, setup: Setup, seed: int = 0) -> None:
        self.setup, self.model = setup, Net()
        self.balancer = setup.balancer(seed)
        self._connect()

    def _connect(self) -> None:
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.balancer.parameters()], lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3) if self.setup.scaler else None

    @property
    def given_scaler(self) -> dict[str, Any]:
        """The keyword of the balancer's methods."""
        return {} if self.scaler is None else {"scaler": self.scaler}

    def restored(self) -> Trainer:
        """Return a new training that continues this one from its checkpoint."""
        other = Trainer(self.setup, seed=5)
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.balancer.state_dict()], file)
        file.seek(0)
        model, state = torch.load(file, weights_only=True)
        other.model.load_state_dict(model)
        other.balancer.load_state_dict(state)
        return self._continued(other)

    def copied(self) -> Trainer:
        """Return a deep copy."""
        other = copy.copy(self)
        other.model, other.balancer = copy.deepcopy((self.model, self.balancer))
        other._connect()
        return self._continued(other)

    def _continued(self, other: Trainer) -> Trainer:
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if self.scaler is not None and other.scaler is not None:
            other.scaler.load_state_dict(self.scaler.state_dict())
            other.scaler.scale(torch.ones(()))  # initialises the scale
        for mine, its in zip(self.parameters(), other.parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        return other

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the model and of the balancer."""
        return [*self.model.parameters(), *self.balancer.parameters()]

    def gradients(self) -> dict[str, Tensor | None]:
        """Return copies of ``.grad`` by name."""
        named = [*self.model.named_parameters(), *self.balancer.named_parameters(prefix="balancer")]
        return {name: None if p.grad is None else p.grad.clone() for name, p in named}

    def state(self) -> dict[str, Tensor | None]:
        """Return copies of the state of the balancer by name."""
        return {name: value.clone() for name, value in self.balancer.state_dict().items()}

    def everything(self) -> dict[str, Tensor | None]:
        """Return copies of all parameters, states and gradients by name."""
        weights = {f"model.{name}": p.detach().clone() for name, p in self.model.named_parameters()}
        return {**weights, **{f"{name}.grad": g for name, g in self.gradients().items()}, **self.state()}

    # Parts of a step

    def clear(self, step: Step) -> None:
        """Set ``.grad`` to None where the step demands it."""
        if step.clear == "all":
            self.optimizer.zero_grad()
        elif step.clear == "model":
            self.model.zero_grad()

    def forward(self, step: Step, parts: list[Tensor] | None = None) -> Iterator[dict[str, Any]]:
        """Yield arguments of the balancer, for each micro-batch; for the whole batch if parts is None."""
        everything = torch.arange(ROWS)
        for rows in [everything] if parts is None else parts:
            positions = torch.arange(len(rows))
            own = dict.fromkeys(step.tasks, positions)
            if step.way == "collect" and step.skips and len(step.tasks) > 1:
                own[step.tasks[0]] = positions[rows >= ROWS // step.micro]
            z = self.model.features(step, rows)
            losses: Any = self.model.losses(step, z, own)
            if parts is None and step.stacked and len(losses) == len(TASKS):
                losses = torch.stack(list(losses.values()))
            arguments = {"losses": losses, "features": z, "shared": self.model.trunk.parameters()}
            if step.extra:
                arguments["extra"] = self.model.regulariser()
            if parts is None and step.measure:
                arguments["measure"] = self.model.trunk[2].parameters()
            if parts is not None:
                arguments["counts"] = {task: len(rows) for task, rows in own.items() if len(rows)}
            yield arguments

    def run(self, step: Step, way: str) -> tuple[str | None, balance.Report | None]:
        """Take the balancer's part of a step; return its error or its record."""
        try:
            if way == "collect":
                with self.balancer.collect(factor=step.factor):
                    for arguments in self.forward(step, list(torch.arange(ROWS).tensor_split(step.micro))):
                        self.balancer.backward(**arguments, **self.given_scaler)
            else:
                (arguments,) = self.forward(step)
                self._run_whole(step, way, arguments)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", None
        return None, self.balancer.report

    def _run_whole(self, step: Step, way: str, arguments: dict[str, Any]) -> None:
        if step.trial:
            self._check_trial(arguments)
        if way == "loss":
            total = self.balancer.loss(**arguments, **self.given_scaler) * step.factor
            (total if self.scaler is None else self.scaler.scale(total)).backward()
        else:
            self.balancer.backward(**arguments, **self.given_scaler, factor=step.factor)

    def _check_trial(self, arguments: dict[str, Any]) -> None:
        """Check that `weights` changes nothing; the step that follows must return the same weights."""
        before = self.everything()
        self.trial = None
        with contextlib.suppress(ValueError):  # of losses that are not finite
            self.trial = self.balancer.weights(**{name: value for name, value in arguments.items() if name != "extra"})
        assert_same(self.everything(), before, "after weights()")

    def update(self) -> None:
        """Make the optimizer's step."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def observe(self, step: Step) -> str | None:
        """Pass the losses of a step after the optimizer's step to the balancer; return its error."""
        try:
            with torch.no_grad():
                rows = torch.arange(ROWS)
                self.balancer.observe(self.model.losses(step, self.model.features(step, rows), dict.fromkeys(step.tasks, rows)))
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], when: str) -> None:
    """Compare tensors by name, bit for bit."""
    assert found.keys() == expected.keys(), when
    for name, right in expected.items():
        left = found[name]
        assert (left is None) == (right is None), f"{name} {when}: {left}, expected {right}"
        if left is not None and right is not None:
            equal = torch.equal(left, right) or torch.equal(left.nan_to_num(7.7), right.nan_to_num(7.7))
            assert equal, f"{name} {when}: {left}, expected {right}"


def assert_near(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], when: str, rtol: float = 1e-6) -> None:
    """Compare gradients by name, up to rounding relative to the largest of them."""
    largest = max((float(right.abs().max()) for right in expected.values() if right is not None), default=0.0)
    for name, right in expected.items():
        left = found[name]
        assert (left is None) == (right is None), f"{name} {when}: {left}, expected {right}"
        if left is not None and right is not None:
            assert float((left - right).abs().max()) <= rtol * largest + 1e-12, f"{name} {when}: {left}, expected {right}"


def fields(report: balance.Report | None) -> dict[str, Tensor | None]:
    """Return the tensors of a record by name."""
    if report is None:
        return {}
    return {name: value for name, value in vars(report).items() if value is None or isinstance(value, Tensor)}


def all_finite(tensors: dict[str, Tensor | None]) -> bool:
    """Return whether no entry of any tensor is infinite or NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor is not None)
