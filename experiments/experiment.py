"""What the trainer asks of an experiment's folder, which is a module with these names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from torch import nn

from balance.registry import unknown

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset
    from torchmetrics import Metric

FOLDER = Path(__file__).resolve().parent

Batch = tuple["Tensor", ...]  # inputs first, then what the losses need


class Splits(NamedTuple):
    """Data sets whose items are batches of tensors when they are indexed with a list."""

    train: Dataset[Batch]
    validation: Dataset[Batch]
    test: Dataset[Batch]


class Network(nn.Module):
    """A shared trunk, whose outputs are the features, and heads, which make of them the outputs by task."""

    def __init__(self, trunk: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = heads

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by task."""
        outputs: dict[str, Tensor] = self.heads(self.trunk(inputs))
        return outputs


class Experiment(Protocol):
    """A folder under ``experiments``."""

    TASKS: tuple[str, ...]
    HIGHER_IS_BETTER: frozenset[str]  # among the metrics, which are named <task>/<metric>
    DataConfig: type

    def load(self, config: object) -> Splits:
        """The data that a ``DataConfig`` describes."""

    def build_model(self) -> Network:
        """A freshly initialised network."""

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The K task losses of a batch, scalars."""

    def metrics(self) -> dict[str, Metric]:
        """Fresh metrics by name."""

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """What the metrics compare the outputs with, by task."""


def names() -> tuple[str, ...]:
    """Names of the experiments: the folders with a configuration."""
    return tuple(sorted(file.stem for file in (FOLDER / "configs").glob("*.yaml")))


def find(name: str) -> Experiment:
    """The experiment called ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in names():
        raise ValueError(unknown("experiment", name, names()))
    return cast("Experiment", import_module(f"experiments.{name}"))
