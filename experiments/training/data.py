"""Batches of a problem's data: their order, their workers, the time waited for them, their device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from omegaconf import DictConfig
    from torch.utils.data import Dataset

    from experiments.problems.base import Batch


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
    order = RandomSampler(data, generator=torch.Generator().manual_seed(config.seed))  # type: ignore[arg-type]
    sampler = BatchSampler if config.protocol == "paper" else JoinedBatchSampler
    return _data_loader(data, sampler(order, train.batch_size, drop_last=False), train.num_workers)


def evaluation_batches(data: Dataset[Batch], train: DictConfig) -> DataLoader[Batch]:
    """Return validation or test data in batches, in order."""
    order = SequentialSampler(data)  # type: ignore[arg-type]
    return _data_loader(data, BatchSampler(order, train.eval_batch_size, drop_last=False), train.num_workers)


def _data_loader(data: Dataset[Batch], lists: BatchSampler, workers: int) -> DataLoader[Batch]:
    """Return a data loader that indexes the data with whole lists, and collates nothing."""
    return DataLoader(data, sampler=lists, batch_size=None, num_workers=workers)


def set_epoch(data: Dataset[Batch], epoch: int) -> None:
    """Set the epoch of data that changes from epoch to epoch. Call it before the epoch's workers start."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)


def to_device(batch: Batch, device: str) -> Batch:
    """Return a batch with all its parts on a device."""
    return tuple(part.to(device) for part in batch)


class TimedBatches:
    """Batches of an epoch, and the time that their consumer waits for them.

    Args:
        batches: Batches of the epoch. The time that their worker processes take to start counts too.
    """

    def __init__(self, batches: DataLoader[Batch]) -> None:
        self.batches = batches
        self.begin = time.perf_counter()
        self.waited = 0.0  # seconds

    def __iter__(self) -> Iterator[Batch]:
        begin = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()

    def waiting_share(self) -> float:
        """Return the share of the time since the epoch began that was spent waiting, in 0..1."""
        return self.waited / (time.perf_counter() - self.begin)
