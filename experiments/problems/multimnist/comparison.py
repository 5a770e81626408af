"""The published comparison: every way to train two tasks of one or of very different scales, over seeds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import nll_loss
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from balance import Balancer
from balance.messages import unknown
from experiments.problems.base import by_design
from experiments.problems.multimnist.data import DataConfig, load
from experiments.problems.multimnist.model import ModelConfig, build_model
from experiments.problems.multimnist.tasks import TASKS, losses, metrics, targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.utils.data import Dataset

    from experiments.problems.base import Batch, Network, Splits

IMBALANCE = 1000.0
MEMORY = 0.99  # of the running mean of the training losses, per step


class Configuration(NamedTuple):
    """A way to train: what the stage does, and what the network does."""

    trained: tuple[str, ...] = TASKS  # the tasks whose results count
    loss: str = "ls"
    gradient: str | None = None
    loss_options: Mapping[str, Any] | None = None
    splitter: str | None = None
    shared: str = "trunk"


CONFIGURATIONS: Mapping[str, Configuration] = {
    **{f"single-{t}": Configuration((t,), "stl", loss_options={"main_task": k}) for k, t in enumerate(TASKS)},
    "summed-loss": Configuration(),
    "pcgrad": Configuration(gradient="pcgrad", shared="everything"),
    "normalized-splitter": Configuration(splitter="normalized"),
    **{f"normalized-project{k}": Configuration(splitter=f"normalized-project{k}") for k in (1, 2, 3)},
    **{f"project{k}": Configuration(splitter=f"project{k}") for k in (1, 2, 3)},
}
DRAWN = ("single-left", "single-right", "normalized-splitter", "normalized-project3", "pcgrad", "project3", "summed-loss")


@dataclass
class Settings:
    """How all configurations are trained: Adam, whose rate rises linearly in the first epoch and falls to a tenth later."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    decay_epoch: int = 50
    data: DataConfig = field(default_factory=DataConfig)
    width: int = 8

    @property
    def network(self) -> str:
        """The network that suits the data."""
        return "small" if self.data.path is None else "demo"


@dataclass
class Result:
    """What a run found, by task: training losses, validation losses and accuracies of every epoch, and the test once.

    Training losses are running means, without the imbalance; validation and test losses have no smoothing.
    """

    configuration: str
    imbalance: float
    seed: int
    epoch: int = 0  # the one that was tested, from 1
    train_loss: dict[str, list[float]] = field(default_factory=dict)
    validation_loss: dict[str, list[float]] = field(default_factory=dict)
    validation_accuracy: dict[str, list[float]] = field(default_factory=dict)
    test_accuracy: dict[str, float] = field(default_factory=dict)
    test_loss: dict[str, float] = field(default_factory=dict)


class Evaluation(NamedTuple):
    """Of a data set, by task."""

    losses: dict[str, float]
    accuracies: dict[str, float]


def compare(
    configurations: Sequence[str],
    seeds: int,
    settings: Settings,
    folder: Path,
    *,
    imbalances: Sequence[float] = (IMBALANCE, 1.0),
    advance: Callable[[str], object] = lambda _: None,
) -> list[Result]:
    """Train every configuration with every imbalance and seed, on the same data.

    Args:
        configurations: Among `CONFIGURATIONS`.
        seeds: How many, from 0: of the network, of the order of the batches, and of what draws.
        settings: Common to all.
        folder: Gets a JSON file for each run.
        imbalances: Factors of the right loss.
        advance: Is told what is trained, after every epoch.

    Raises:
        ValueError: If a name is unknown or a number is out of range.
        FileNotFoundError: If a file of MNIST is missing.
    """
    for name in configurations:
        if name not in CONFIGURATIONS:
            raise ValueError(unknown("configuration", name, CONFIGURATIONS))
    if min(seeds, settings.epochs, settings.batch_size) < 1:
        raise ValueError(
            f"Seeds, epochs and batch size must be at least 1, but got {seeds}, {settings.epochs} and {settings.batch_size}."
        )
    results = []
    for imbalance in imbalances:
        data = load(DataConfig(**{**asdict(settings.data), "imbalance": imbalance}))
        for name in configurations:
            for seed in range(seeds):
                label = f"{name}, imbalance {imbalance:g}, seed {seed}"
                result = train(name, imbalance, seed, settings, data, advance=lambda label=label: advance(label))  # type: ignore[misc]
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{name}_imbalance{imbalance:g}_seed{seed}.json"
                file.write_text(json.dumps({"settings": asdict(settings), **asdict(result)}, indent=1) + "\n", encoding="utf-8")
                results.append(result)
    return results


def train(
    name: str, imbalance: float, seed: int, settings: Settings, data: Splits, *, advance: Callable[[], object] = lambda: None
) -> Result:
    """One run. The epoch that is tested has the best mean accuracy of the trained tasks on validation.

    With ``protocol=paper``, whose validation pairs are the test pairs, it is the last.
    """
    configuration = CONFIGURATIONS[name]
    torch.manual_seed(seed)
    model = build_model(ModelConfig(settings.network, settings.width, configuration.splitter, configuration.shared, seed))
    balancer = Balancer(TASKS, configuration.loss, configuration.gradient, loss_options=configuration.loss_options, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    order = RandomSampler(data.train, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    batches = loader(data.train, order, settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches), settings.decay_epoch))
    means = RunningMeans()
    result = Result(name, imbalance, seed)
    best = -1.0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            with by_design():
                report = balancer.backward(losses(model(batch[0]), batch), shared=model.trunk.parameters())
            optimizer.step()
            schedule.step()
            left, right = report.losses.tolist()
            means.update([left, right / imbalance])
        balancer.end_epoch()
        validation = evaluate(model, data.validation)
        for k, task in enumerate(TASKS):
            result.train_loss.setdefault(task, []).append(means.values[k])
            result.validation_loss.setdefault(task, []).append(validation.losses[task])
            result.validation_accuracy.setdefault(task, []).append(validation.accuracies[task])
        accuracy = sum(validation.accuracies[task] for task in configuration.trained)
        if accuracy > best or settings.data.protocol == "paper":
            test = evaluate(model, data.test)
            best, result.epoch, result.test_accuracy, result.test_loss = accuracy, epoch, test.accuracies, test.losses
        advance()
    return result


class RunningMeans:
    """Exponential means of the task losses over the steps, each starting at its first value."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, losses: list[float]) -> None:
        """Take in the losses of a step."""
        before = self.values or losses
        self.values = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(before, losses, strict=True)]


def rate(step: int, steps_per_epoch: int, decay_epoch: int) -> float:
    """Factor of the learning rate at a step, counted from 0."""
    if step < steps_per_epoch:
        return step / steps_per_epoch
    return 1.0 if step < decay_epoch * steps_per_epoch else 0.1


def loader(data: Dataset[Batch], order: Any, batch_size: int) -> DataLoader[Batch]:
    """Batches that are indexed at once, not collated sample by sample."""
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)


@torch.no_grad()
def evaluate(model: Network, data: Dataset[Batch]) -> Evaluation:
    """Mean negative log-likelihoods and accuracies over all samples."""
    model.eval()
    accuracies, sums, count = metrics(), dict.fromkeys(TASKS, 0.0), 0
    for batch in loader(data, SequentialSampler(data), 1000):  # type: ignore[arg-type]
        outputs: dict[str, Tensor] = model(batch[0])
        labels = targets(batch)
        count += len(batch[0])
        for task in TASKS:
            accuracies[f"{task}/accuracy"].update(outputs[task], labels[task])
            sums[task] += float(nll_loss(outputs[task].log_softmax(dim=1), labels[task], reduction="sum"))
    of_task = {task: accuracies[f"{task}/accuracy"].compute().item() for task in TASKS}
    return Evaluation({task: total / count for task, total in sums.items()}, of_task)


def summary(results: Iterable[Result]) -> dict[tuple[str, float, str], list[float]]:
    """Test accuracies of the runs of every configuration, imbalance and task; of tasks that were trained."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for result in results:
        for task in CONFIGURATIONS[result.configuration].trained:
            found.setdefault((result.configuration, result.imbalance, task), []).append(result.test_accuracy[task])
    return found
