"""The processes that train one model together, and sums over them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup, Work

# torch 2.13 has given these functions other names
_REDUCE_SCATTER: Any = getattr(distributed, "reduce_scatter_single", None) or getattr(
    distributed, "reduce_scatter_tensor", None
)
_ALL_GATHER: Any = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)


# Groups that several objects share, with the groups that they were made from. Each group costs threads or a communicator
_SHARED: list[tuple[ProcessGroup, ProcessGroup]] = []


class Ranks:
    """The processes that train one model together, with a process group that no wrapper uses.

    The collectives of a stage would otherwise interleave with the collectives of DistributedDataParallel, in a different
    order on different ranks. The group is created when it is first used, so every rank must reach that point.

    Args:
        process_group: The data-parallel processes; None: all processes.
        is_shared: Use one group for all objects that say so. Their collectives must have the same order on all ranks.

    Attributes:
        has_checked_reduction: Whether the wrapper of the model has been checked once.
    """

    def __init__(self, process_group: ProcessGroup | None = None, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.has_checked_reduction = False
        self._process_group = process_group
        self._own_group: ProcessGroup | None = None
        self._parent: ProcessGroup | None = None  # the group that the own group was made from

    def __reduce__(self) -> tuple[Callable[..., Ranks], tuple[()]]:
        # A process group belongs to one process; a copy in another process uses all processes
        return partial(Ranks, is_shared=self.is_shared), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self._process_group, is_shared=self.is_shared)

    @property
    def size(self) -> int:
        """Number of processes; 1 without torch.distributed."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self._process_group)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return distributed.get_rank(self._process_group) if self.size > 1 else 0

    @property
    def group(self) -> ProcessGroup:
        """The process group of the collectives. The first use on every rank creates it."""
        parent = self._process_group or distributed.group.WORLD
        if self._own_group is None or self._parent is not parent:  # torch.distributed may have been restarted
            assert parent is not None
            shared = next((group for other, group in _SHARED if other is parent), None) if self.is_shared else None
            self._own_group = _new_group(parent) if shared is None else shared
            self._parent = parent
            if self.is_shared and shared is None:
                _SHARED.append((parent, self._own_group))
        return self._own_group

    def connect(self) -> None:
        """Create the process group, if there are several processes and it does not exist yet. Every rank must call this."""
        if self.size > 1:
            _ = self.group

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; the tensor itself if there is only one process.

        Args:
            numbers: A tensor of the same shape and dtype on every rank; overwritten.
        """
        if self.size == 1:
            return numbers
        total = numbers.to(self.device(numbers))
        distributed.all_reduce(total, group=self.group)
        return total.to(numbers.device)

    def reduce_scatter(self, shard: Tensor, row: Tensor) -> Work:
        """Begin to sum a row over the processes, of which each gets one shard.

        Args:
            shard: The shard of this rank, overwritten. Shape (n / processes,).
            row: Shape (n,).

        Returns:
            The work, to be waited for.
        """
        work: Work = _REDUCE_SCATTER(shard, row, group=self.group, async_op=True)
        return work

    def all_gather(self, row: Tensor, shard: Tensor) -> None:
        """Gather a row from the shards of all processes.

        Args:
            row: Overwritten. Shape (n,).
            shard: The shard of this rank. Shape (n / processes,).
        """
        _ALL_GATHER(row, shard, group=self.group)

    def device(self, tensor: Tensor) -> torch.device:
        """Return the device on which a tensor can be communicated: its own, or the accelerator that the backend requires."""
        if f"{tensor.device.type}:" in distributed.get_backend_config(self.group):
            return tensor.device
        return torch.device("cuda", torch.cuda.current_device())


def _new_group(parent: ProcessGroup) -> ProcessGroup:
    """Create a process group with the members of another one."""
    members = distributed.get_process_group_ranks(parent)
    # Without local synchronization, processes outside of the group would have to take part
    local = len(members) < distributed.get_world_size()
    group: ProcessGroup = distributed.new_group(members, use_local_synchronization=local)
    return group
