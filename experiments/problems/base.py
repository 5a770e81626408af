"""What the trainer asks of an experiment's folder, which is a module with these names."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from torch import nn

from balance.messages import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.utils.data import Dataset
    from torchmetrics import Metric

FOLDER = Path(__file__).resolve().parent

# Inputs first, then what the losses need: tensors, or whatever else has a method ``to(device)``, such as a batch of graphs
Batch = tuple[Any, ...]


@contextmanager
def by_design() -> Iterator[None]:
    """Silence warnings about what experiments do on purpose: published codes share whole networks, and epochs can be long."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="shared must hold parameters that several tasks reach")
        warnings.filterwarnings("ignore", message=r"The loss balancer .* needs balancer\.end_epoch\(\)")
        yield


class Splits(NamedTuple):
    """Data sets whose items are batches when they are indexed with a list.

    One whose items change from epoch to epoch has ``set_epoch(epoch)``, which is called before each, so that worker processes
    know. Validation and test may be one object.
    """

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]


class Network(nn.Module):
    """A shared trunk, whose outputs are the features, and heads, which make of them the outputs by task.

    Features are a tensor, or several in sequences or dicts.
    """

    def __init__(self, trunk: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Outputs by task."""
        outputs: dict[str, Tensor] = self.heads(self.trunk(inputs))
        return outputs


class Experiment(Protocol):
    """A folder under ``experiments``. Beside the names below it may have others.

    ``ModelConfig``: a dataclass, which ``build_model`` is then given; the group ``model`` of the configuration.

    ``ON_DISK``: the ``source``, among those of ``DataConfig``, that ``data.path`` implies.

    ``score(metrics)``: a number by which the best epoch is chosen, the least one being the best, in place of delta_m.

    ``DataConfig`` may have an entry ``protocol``, and ``losses`` and ``metrics`` a parameter of that name: ``"sound"``, or
    ``"paper"`` for what the published codes do in another way.
    """

    TASKS: tuple[str, ...]
    HIGHER_IS_BETTER: frozenset[str]  # among the metrics, which are named <task>/<metric>
    DataConfig: type

    def load(self, config: object) -> Splits:
        """The data that a ``DataConfig`` describes."""

    @property
    def build_model(self) -> Callable[..., Network]:
        """A freshly initialised network, from a ``ModelConfig`` where the experiment has one."""

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The K task losses of a batch, scalars; a task for which nothing in the batch counts may be left out."""

    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics by name. One may have a method ``remark()``: words about its value, or none."""

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """What the metrics compare the outputs with, by task."""


def names() -> tuple[str, ...]:
    """Names of the experiments: the folders with a configuration."""
    return tuple(sorted(file.parent.name for file in FOLDER.glob("*/config.yaml")))


def find(name: str) -> Experiment:
    """The experiment called ``name``.

    Raises:
        ValueError: If there is none.
        ModuleNotFoundError: If it needs a library that is not installed.
    """
    if name not in names():
        raise ValueError(unknown("experiment", name, names()))
    try:
        return cast("Experiment", import_module(f"experiments.problems.{name}"))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("experiments", "balance"):  # which says by itself what to do
            raise
        message = f"The experiment '{name}' needs {error.name}: pip install 'mtl-balance[experiments]'."
        raise ModuleNotFoundError(message) from None


def under(protocol: str, experiment: Experiment) -> Experiment:
    """The experiment, with losses and metrics as a protocol has them, where they know it."""
    bound = {
        name: partial(getattr(experiment, name), protocol=protocol)
        for name in ("losses", "metrics")
        if "protocol" in inspect.signature(getattr(experiment, name)).parameters
    }
    return cast("Experiment", SimpleNamespace(**(vars(experiment) | bound)))


def build_network(experiment: Experiment, config: Any) -> Network:
    """The network of an experiment, from the group ``model`` of a configuration where there is one."""
    return experiment.build_model(config.model) if hasattr(experiment, "ModelConfig") else experiment.build_model()
