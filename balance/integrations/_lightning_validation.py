"""Losses of validation data in the training loop of Lightning, for rules that learn from them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import CombinedLoader

from ..stage.arguments import read_losses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightning.pytorch import Trainer
    from torch import Tensor

    from ..stage.arguments import Counts
    from ..stage.balancer import Balancer


class MeanLosses:
    """Mean losses over the batches of a validation run, of the tasks that are present in each.

    Args:
        balancer: The balancer that will observe the means.
    """

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer
        self._sums = dict.fromkeys(balancer.tasks, 0.0)
        self._counts = dict.fromkeys(balancer.tasks, 0.0)

    def add(self, losses: Mapping[str, Tensor] | Tensor, counts: Counts | None) -> None:
        """Add the losses of a batch.

        Args:
            losses: As for `Balancer.backward`.
            counts: Numbers of samples that the losses are means of; None: 1 for each.
        """
        step = read_losses(losses, self._balancer.tasks, self._balancer.nan, self._balancer.zero, counts)
        for task, loss, count in zip(step.tasks, step.host.tolist(), step.counts, strict=True):
            self._sums[task] += count * loss
            self._counts[task] += count

    def observe(self) -> None:
        """Pass the means to the balancer; over several ranks, each rank's means with their counts."""
        counts = {task: count for task, count in self._counts.items() if count}
        losses = {task: torch.tensor(self._sums[task] / count, dtype=torch.float64) for task, count in counts.items()}
        self._balancer.observe_validation(losses, counts=counts)


class ValidationBatches:
    """Batches of all validation data loaders, one after the other, over and over again.

    Attributes:
        drawn: Number of batches that have been drawn since the beginning of the first loader.
    """

    def __init__(self) -> None:
        self.drawn = 0
        self._batches: Iterator[Any] | None = None

    def close(self) -> None:
        """Drop the iterator of the loaders. The next batch is the batch that would have followed."""
        self._batches = None

    def restart(self) -> None:
        """Begin anew, as after a validation run, which uses the same workers of a loader."""
        self.drawn, self._batches = 0, None

    def next(self, trainer: Trainer) -> Any:
        """Return the next batch, on the device of the module.

        Args:
            trainer: The trainer, whose limit of validation batches holds.
        """
        if self._batches is None:  # also after a checkpoint has been loaded
            self._batches = islice(_batches(trainer), self.drawn, None)
        batch = next(self._batches, None)
        if batch is None:
            self.restart()
            self._batches = _batches(trainer)
            batch = next(self._batches)
        self.drawn += 1
        number, batch = batch
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=number)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=number)


def _batches(trainer: Trainer) -> Iterator[tuple[int, Any]]:
    """Yield all batches of the validation data loaders, each with the number of its loader."""
    if trainer.val_dataloaders is None:  # as before the first validation run
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for number, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        yield from ((number, batch) for batch in islice(loader, None if limit == float("inf") else int(limit)))
