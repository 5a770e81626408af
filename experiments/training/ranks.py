"""The processes that train one network together, as torchrun starts them. Only the first one writes and prints."""

from __future__ import annotations

import datetime
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)  # a rank may wait for the first one's evaluation; a dead rank is noticed at once


def size() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has started any; this process then has a GPU, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group(backend, timeout=PATIENCE)
    if not is_first():
        warnings.simplefilter("ignore")
    yield
    distributed.destroy_process_group()  # not after an exception, when other ranks may be dead


def largest(number: int) -> int:
    """Return the largest of the numbers of all ranks. Every rank must call it."""
    if size() == 1:
        return number
    numbers = torch.tensor(number)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)


def from_first(value: T) -> T:
    """Return the value of the first rank. Every rank must call it."""
    if size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def by_rank(value: T) -> list[T]:
    """Return the values of all ranks. Every rank must call it."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def part(count: int) -> slice:
    """Return the part of this rank of a number of samples; earlier ranks have one more if the number cannot be divided."""
    quotient, rest = divmod(count, size())
    first = rank() * quotient + min(rank(), rest)
    return slice(first, first + quotient + (rank() < rest))
