"""The contract of a problem, and the problems by name: every folder here with a ``config.yaml``.

To add a problem, add a folder whose ``__init__.py`` exports the attributes of `Problem`. The first line of its docstring is the
description of the problem in lists.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

from torch import Tensor, nn

from balance.messages import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

    from torch.utils.data import Dataset
    from torchmetrics import Metric

FOLDER = Path(__file__).resolve().parent

# The inputs, then the data that the losses need: tensors, or objects with a method ``to(device)`` such as a batch of graphs
Batch: TypeAlias = tuple[Any, ...]
ByTask: TypeAlias = dict[str, Tensor]
ProtocolName: TypeAlias = Literal["sound", "paper"]  # sound evaluation, or evaluation as in the published codes
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)


class Splits(NamedTuple):
    """Data sets whose items are batches when they are indexed with a list.

    A data set whose items change from epoch to epoch has a method ``set_epoch(epoch)``. It is called before each epoch, so that
    worker processes receive the epoch too. A data set that draws random numbers as it is read draws them from its attribute
    ``generator``, a `torch.Generator`, which a checkpoint saves. Validation and test may be one object.
    """

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]


class Agent(Protocol):
    """A learner that collects its own batches while it trains, in place of a data loader.

    An epoch is an iteration over it, and each item is the batch of one step. The trainer balances the losses of trunk and heads
    in this step. Further networks are trained by the agent.
    """

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch, or of the rest of one after `resume`."""

    def after_step(self) -> None:
        """Do what follows a step of the trainer. A checkpoint is saved only after it."""

    def metrics(self) -> dict[str, float]:
        """Return the agent's present state as metrics, such as results of the last episode."""

    def evaluate(self, data: Dataset[Batch]) -> Iterator[dict[str, float]]:
        """Yield values of the problem's metrics, in parts between which a run can be interrupted."""

    def policy(self) -> tuple[nn.Module, Tensor]:
        """Return the network to record, and an input of it."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on, except for network and global random generators."""

    def resume(self, state: Mapping[str, Any], position: int) -> None:
        """Continue from a state, at a step of an epoch."""

    def close(self) -> None:
        """Free what the agent holds, such as processes."""


class Network(nn.Module):
    """A shared trunk, whose outputs are the features, and heads, which map the features to outputs by task.

    Features are a tensor, or several tensors in sequences or dicts.
    """

    def __init__(self, trunk: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, inputs: Any) -> ByTask:
        """Return outputs by task."""
        outputs: ByTask = self.heads(self.trunk(inputs))
        return outputs

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters of trunk and heads, which the trainer's optimizer trains; an agent trains further ones."""
        return list(dict.fromkeys([*self.trunk.parameters(), *self.heads.parameters()]))


class Heads(nn.ModuleDict):
    """One head per task, so that the gradient of a task does not reach the heads of the other tasks."""

    def forward(self, features: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]) -> ByTask:
        """Return outputs by task.

        Args:
            features: The input of all heads, or one input per task: in the order of the tasks, or by task.

        Returns:
            The output of each head.
        """
        if isinstance(features, Tensor):
            features = (features,) * len(self)
        if isinstance(features, tuple):
            features = dict(zip(self, features, strict=True))
        return {task: head(features[task]) for task, head in self.items()}


class ScalarHead(nn.Linear):
    """A linear head with one output."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return one number for each sample. Shape (B, F) -> (B,)."""
        return super().forward(features).squeeze(1)


@dataclass
class NoOptions:
    """The group ``model`` of a problem that offers no choice of the network."""


def _no_targets(_: Batch) -> ByTask:
    return {}


@dataclass(frozen=True)
class Problem:
    """A multi-task problem: names that its folder exports, with defaults for names that a folder may leave out.

    Attributes:
        TASKS: Names of the tasks.
        HIGHER_IS_BETTER: Names of the metrics whose best value is the highest.
        DataConfig: A dataclass, the group ``data`` of a configuration. It may have an entry ``protocol``.
        load: Return the data that a ``DataConfig`` describes.
        build_model: Return a freshly initialised network. It takes a ``ModelConfig`` if the folder exports one.
        losses: Return the scalar task losses of a batch, from outputs by task and the batch. A task may be left out if nothing
            in the batch counts for it. With a parameter ``protocol``: ``"sound"``, or ``"paper"`` as the published codes do it.
        metrics: Return fresh metrics by name, which is ``<task>/<metric>``. It may have a parameter ``protocol`` as well. A
            metric may have a method ``remark()``, which returns a note on its value or an empty text.
        targets: Return by task the part of a batch that the metrics compare outputs with; not needed with ``build_agent``.
        ModelConfig: A dataclass, the group ``model`` of a configuration.
        ON_DISK: The value of ``data.source`` that ``data.path`` implies; None if the problem reads no files.
        counts: Return by task the number of values in a batch that its loss is the mean of, such as labelled pixels. Several
            processes weight their losses with it. None for the number of samples. It may have a parameter ``protocol`` as well.
        score: Return the number by which the best epoch is chosen, the lowest, from its validation metrics; None for delta_m.
        SINGLE_TASK_BASELINES: Whether a network that is trained on one task only is worth comparing with. If not, sweeps
            train no such networks, and tables have no delta_m.
        task_names: Return the names of the tasks from a ``DataConfig``, where its data decide them, instead of ``TASKS``. All
            functions of batches, outputs and networks may then have a parameter ``tasks``.
        micro_batches: Yield the micro-batches of a batch, in the form of batches, such as one data set each. A step computes
            them one after the other, with ``train.micro_batches``; each one yields losses of some of the tasks. None for one.
        build_agent: Return the agent that collects the batches and gives the metrics their values, from data, network,
            configuration and ``tasks``. None for a problem whose batches are read from its data.
        AgentConfig: A dataclass, the group ``agent`` of a configuration.
        summarize: Return metrics of all tasks together, named ``all/<metric>``, from the final metrics, and from the
            validation metrics of each epoch. They have no rank and no part in delta_m.
    """

    TASKS: tuple[str, ...]
    HIGHER_IS_BETTER: frozenset[str]
    DataConfig: type
    load: Callable[[Any], Splits]
    build_model: Callable[[Any], Network]
    losses: Callable[[ByTask, Batch], ByTask]
    metrics: Callable[[], dict[str, Metric]]
    targets: Callable[[Batch], ByTask] = _no_targets
    ModelConfig: type = NoOptions
    ON_DISK: str | None = None
    counts: Callable[[Batch], dict[str, int]] | None = None
    score: Callable[[Mapping[str, float]], float] | None = None
    SINGLE_TASK_BASELINES: bool = True
    task_names: Callable[[Any], tuple[str, ...]] | None = None
    micro_batches: Callable[[Batch], Iterator[Batch]] | None = None
    build_agent: Callable[[Splits, Any, Any], Agent] | None = None
    AgentConfig: type | None = None
    summarize: Callable[[Mapping[str, float], Sequence[Mapping[str, float]]], dict[str, float]] | None = None


def names() -> tuple[str, ...]:
    """Return the names of the problems: the folders with a configuration."""
    return tuple(sorted(file.parent.name for file in FOLDER.glob("*/config.yaml")))


def summaries() -> dict[str, str]:
    """Return the first line of every problem's docstring by name; nothing is imported."""
    sources = {name: (FOLDER / name / "__init__.py").read_text(encoding="utf-8") for name in names()}
    return {name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0] for name, source in sources.items()}


def find(name: str) -> Problem:
    """Import a problem.

    Args:
        name: Name of its folder.

    Returns:
        The problem.

    Raises:
        ValueError: If there is no such problem, or its folder does not export a name that a problem must have.
        ModuleNotFoundError: If the problem needs a library that is not installed.
    """
    if name not in names():
        raise ValueError(unknown("experiment", name, names()))
    try:
        return _problem(import_module(f"{__package__}.{name}"))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("experiments", "balance"):  # its message has the remedy
            raise
        message = f"The experiment '{name}' needs {error.name}: pip install -e . --group experiments."
        raise ModuleNotFoundError(message) from None


def _problem(folder: ModuleType) -> Problem:
    """Return the problem that a folder exports."""
    exported = {entry.name: vars(folder)[entry.name] for entry in fields(Problem) if entry.name in vars(folder)}
    needed = {entry.name for entry in fields(Problem) if entry.default is MISSING}
    needed |= set() if "build_agent" in exported else {"targets"}
    missing = [entry.name for entry in fields(Problem) if entry.name in needed and entry.name not in exported]
    if missing:
        raise ValueError(f"{folder.__file__} must export all names of a problem, but lacks {', '.join(missing)}.")
    if "ModelConfig" not in exported:
        build = exported["build_model"]
        exported["build_model"] = lambda _: build()
    return Problem(**exported)


def under(protocol: str, problem: Problem) -> Problem:
    """Return a problem with the losses, counts and metrics of a protocol, where these depend on the protocol."""
    return _bound(problem, ("losses", "counts", "metrics"), protocol=protocol)


def with_tasks(problem: Problem, data: Any) -> Problem:
    """Return a problem with the tasks that a ``DataConfig`` describes, where the data decide them."""
    if problem.task_names is None:
        return problem
    tasks = problem.task_names(data)
    functions = ("losses", "counts", "metrics", "targets", "build_model", "build_agent")
    return replace(_bound(problem, functions, tasks=tasks), TASKS=tasks)


def tasks_of(config: Any) -> tuple[str, ...]:
    """Return the names of the tasks of a configuration."""
    return with_tasks(find(config.experiment), config.data).TASKS


def _bound(problem: Problem, names: Sequence[str], **values: object) -> Problem:
    """Return a problem whose functions with these names have a value for a parameter, if they have the parameter."""
    functions: dict[str, Callable[..., Any]] = {name: function for name in names if (function := getattr(problem, name))}
    bound: dict[str, Any] = {
        name: partial(function, **values)
        for name, function in functions.items()
        if values.keys() <= inspect.signature(function).parameters.keys()
    }
    return replace(problem, **bound)


def check_source(source: str, path: str | None, on_disk: str, content: str) -> None:
    """Check that ``data.path`` is given if, and only if, ``data.source`` is the data set on disk.

    Args:
        source: Value of ``data.source``.
        path: Value of ``data.path``.
        on_disk: The source that is read from a folder.
        content: Content of that folder, for messages.

    Raises:
        ValueError: If only one of the two is given.
    """
    if source == on_disk and path is None:
        raise ValueError(f"data.path must be the folder with {content}, but got None. Set data.path=FOLDER.")
    if source != on_disk and path is not None:
        raise ValueError(f"data.source must be {on_disk} where data.path is given, but got {source}. Leave one of them out.")


@contextmanager
def by_design() -> Iterator[None]:
    """Silence warnings about deliberate choices of problems: published codes share whole networks, and epochs can be long."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="shared must hold parameters that several tasks reach")
        warnings.filterwarnings("ignore", message=r"The loss balancer .* needs balancer\.end_epoch\(\)")
        yield
