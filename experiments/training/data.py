"""Batches of a problem's data: their order, their workers, the time waited for them, their device."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from experiments.problems.base import Agent, Batch
from experiments.training import ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig


class JoinedBatchSampler(BatchSampler):
    """Sampler of lists of indices that joins a single last index to the list before: batch normalisation needs two samples.

    The published codes do not do so; in their protocol the plain sampler is used.
    """

    def __iter__(self) -> Iterator[list[int]]:
        lists = super().__iter__()
        before = next(lists, [])
        for indices in lists:
            if len(indices) == 1 < self.batch_size:
                before = before + indices
            else:
                yield before
                before = indices
        if before:
            yield before

    def __len__(self) -> int:
        size = len(self.sampler)  # type: ignore[arg-type]
        return super().__len__() - (size > self.batch_size > 1 and size % self.batch_size == 1)


class ResumableSampler(Sampler[list[int]]):
    """Sampler of lists of indices, whose next epoch can begin at any list.

    Args:
        lists: Lists of indices, in an order that is drawn anew for each epoch.
        generator: Random generator of the order.
    """

    def __init__(self, lists: BatchSampler, generator: torch.Generator) -> None:
        self.lists = lists
        self.generator = generator
        self.epoch_state = generator.get_state()  # of the generator, at the beginning of the epoch
        self.first = 0  # list at which the next epoch begins

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch_state = self.generator.get_state()
        first, self.first = self.first, 0
        yield from itertools.islice(self.lists, first, None)

    def __len__(self) -> int:
        return len(self.lists)

    def state(self, position: int) -> torch.Tensor:
        """Return the state of the generator at the beginning of the epoch; of the next epoch for position 0."""
        return self.epoch_state if position else self.generator.get_state()

    def resume(self, state: torch.Tensor, position: int) -> None:
        """Let the next epoch have the order that follows from a state, and begin at a list."""
        self.generator.set_state(state)
        self.first = position


class OwnPart(Dataset[Batch | None]):
    """The part of every batch that this rank trains on; None where it has no sample.

    Args:
        data: Data whose items are batches when it is indexed with a list. Data that draws as it is read is read by every rank
            in whole batches, so that all ranks draw equal numbers.
    """

    def __init__(self, data: Dataset[Batch]) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> Batch | None:
        own = ranks.part(len(indices))
        if hasattr(self.data, "generator"):
            batch = tuple(tensor[own] for tensor in self.data[indices])
        else:
            batch = self.data[indices[own]] if indices[own] else ()
        return batch if indices[own] else None


def training_batches(data: Dataset[Batch], config: DictConfig) -> DataLoader[Batch]:
    """Return training data in batches, shuffled anew for each epoch.

    Args:
        data: Data whose items are batches when it is indexed with a list.
        config: Configuration of the run, whose seed is the seed of the order.

    Raises:
        ValueError: If workers are asked for, and the data draws random numbers: each worker would repeat the others' numbers.
    """
    train = config.train
    if train.num_workers and hasattr(data, "generator"):
        raise ValueError(f"train.num_workers must be 0 for this data, which draws as it is read, but got {train.num_workers}.")
    generator = torch.Generator().manual_seed(config.seed)
    order = RandomSampler(data, generator=generator)  # type: ignore[arg-type]
    sampler = BatchSampler if config.protocol == "paper" else JoinedBatchSampler
    lists = ResumableSampler(sampler(order, train.batch_size, drop_last=False), generator)
    return _data_loader(data if ranks.size() == 1 else OwnPart(data), lists, train.num_workers)


def order_state(batches: DataLoader[Batch] | Agent, position: int) -> torch.Tensor | None:
    """Return the state from which the order of the batches follows; None for an agent."""
    return batches.sampler.state(position) if isinstance(batches, DataLoader) else None  # type: ignore[attr-defined]


def resume_order(batches: DataLoader[Batch] | Agent, state: torch.Tensor | None, position: int) -> None:
    """Let the next epoch have the order that follows from a state, and begin at a batch."""
    if isinstance(batches, DataLoader):
        batches.sampler.resume(state, position)  # type: ignore[attr-defined]


def evaluation_batches(data: Dataset[Batch], train: DictConfig) -> DataLoader[Batch]:
    """Return validation or test data in batches, in order."""
    order = SequentialSampler(data)  # type: ignore[arg-type]
    return _data_loader(data, BatchSampler(order, train.eval_batch_size, drop_last=False), train.num_workers)


def _data_loader(data: Dataset[Any], lists: Sampler[list[int]], workers: int) -> DataLoader[Batch]:
    """Return a data loader that indexes the data with whole lists, and collates nothing."""
    return DataLoader(data, sampler=lists, batch_size=None, num_workers=workers)


def set_epoch(data: Dataset[Batch], epoch: int) -> None:
    """Set the epoch of data that changes from epoch to epoch. Call it before the epoch's workers start."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)


def num_samples(batch: Batch) -> int:
    """Return the number of samples of a batch, which its first tensor has."""
    return next(len(part) for part in batch if isinstance(part, torch.Tensor))


def to_device(batch: Batch, device: str) -> Batch:
    """Return a batch with all its parts on a device."""
    return tuple(part.to(device) for part in batch)


def generator_state(data: Dataset[Batch]) -> Any:
    """Return the state of the generator of data that draws as it is read; None for other data."""
    return data.generator.get_state() if hasattr(data, "generator") else None


def set_generator_state(data: Dataset[Batch], state: Any) -> None:
    """Continue the generator of data that draws as it is read, if `generator_state` returned a state."""
    if state is not None:
        data.generator.set_state(state)  # type: ignore[attr-defined]


class TimedBatches:
    """Batches of an epoch, and the time that their consumer waits for them.

    Args:
        batches: Batches of the epoch. Their worker processes start at once, and the time that they take to start counts too.
    """

    def __init__(self, batches: DataLoader[Batch] | Agent) -> None:
        self.begin = time.perf_counter()
        self.batches = iter(batches)
        self.waited = time.perf_counter() - self.begin  # seconds

    def __iter__(self) -> Iterator[Batch]:
        begin = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()

    def waiting_share(self) -> float:
        """Return the share of the time since the epoch began that was spent waiting, in 0..1."""
        return self.waited / (time.perf_counter() - self.begin)
