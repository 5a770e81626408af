"""Batches of an experiment's data: read, timed, and brought to the device."""

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


class Batches(BatchSampler):
    """Lists of indices. Were the last one to have a single index, it joins the one before: batch normalisation needs two.

    As that makes other batches than those of the published codes, their protocol has the plain sampler in its place.
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


def training(data: Dataset[Batch], config: DictConfig) -> DataLoader[Batch]:
    """Training data in batches, shuffled anew for each epoch.

    Args:
        data: Its items are batches when it is indexed with a list.
        config: Of the run. Its seed is that of the order.

    Raises:
        ValueError: If there are to be workers for data that draws from a generator of its own, of which each would have a copy.
    """
    train = config.train
    if train.num_workers and hasattr(data, "generator"):
        raise ValueError(f"train.num_workers must be 0 for this data, which draws as it is read, but got {train.num_workers}.")
    order = RandomSampler(data, generator=torch.Generator().manual_seed(config.seed))  # type: ignore[arg-type]
    sampler = BatchSampler if config.protocol == "paper" else Batches
    return _loader(data, sampler(order, train.batch_size, drop_last=False), train.num_workers)


def in_order(data: Dataset[Batch], train: DictConfig) -> DataLoader[Batch]:
    """Validation or test data in batches."""
    order = SequentialSampler(data)  # type: ignore[arg-type]
    return _loader(data, BatchSampler(order, train.eval_batch_size, drop_last=False), train.num_workers)


def _loader(data: Dataset[Batch], lists: BatchSampler, workers: int) -> DataLoader[Batch]:
    """Items are indexed with a list at once, not collated sample by sample."""
    return DataLoader(data, sampler=lists, batch_size=None, num_workers=workers)


def begin_epoch(data: Dataset[Batch], epoch: int) -> None:
    """Tell training data, if it wants to know, which epoch begins: before its workers are started."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)


def brought(batch: Batch, device: str) -> Batch:
    """A batch on the device."""
    return tuple(part.to(device) for part in batch)


class Waiting:
    """The batches of an epoch, and how long their consumer waited for them.

    Args:
        batches: The start of the worker processes, if there are any, is waited for too.
    """

    def __init__(self, batches: DataLoader[Batch]) -> None:
        self.batches = batches
        self.begin = time.perf_counter()
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        begin = time.perf_counter()
        for batch in self.batches:
            self.seconds += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()

    def share(self) -> float:
        """Share of the time since the epoch began that was spent waiting, in 0..1."""
        return self.seconds / (time.perf_counter() - self.begin)
