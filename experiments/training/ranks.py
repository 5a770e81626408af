"""The processes that train one network together, as torchrun starts them."""

from __future__ import annotations

import torch
from torch import distributed


def size() -> int:
    """Return the number of processes; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def largest(number: int) -> int:
    """Return the largest of the numbers of all ranks. Every rank must call it."""
    if size() == 1:
        return number
    numbers = torch.tensor(number)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)
