"""Wall time and peak tensor memory of one step."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, UntypedStorage

# torch stores in a global variable whether any dispatch mode is active, and two threads would leave it set
_one_at_a_time = threading.RLock()


class Cost(NamedTuple):
    """Cost of one step.

    Attributes:
        seconds: Median wall time of a call.
        bytes: Peak of tensor memory during a call, relative to the memory before the call.
    """

    seconds: float
    bytes: int


def measure(step: Callable[[], object], *, repeats: int = 5, budget: float = 2.0, device: torch.device | str = "cpu") -> Cost:
    """Measure the time and the memory of a step, which is called once to warm up, then to be timed, then for its memory.

    Args:
        step: Function to measure. It should restore the state before the call: a ``.grad`` that stays is memory that the
            next call does not need to allocate.
        repeats: Greatest number of timed calls.
        budget: Seconds after which no further timed call begins. One timed call always runs.
        device: Device of the computation. CUDA is synchronised before a clock is read.

    Returns:
        The median time and the peak memory.

    Raises:
        ValueError: If ``repeats`` is below 1, or ``budget`` is negative.
    """
    if repeats < 1 or not budget >= 0:
        raise ValueError(f"repeats must be at least 1 and budget at least 0 seconds, but got {repeats} and {budget}.")
    device = torch.device(device)
    step()
    durations: list[float] = []
    while len(durations) < repeats and (not durations or sum(durations) < budget):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        durations.append(time.perf_counter() - start)
    return Cost(statistics.median(durations), peak_memory(step, device))


def peak_memory(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the peak of tensor memory during exactly one call of a step.

    On CUDA the peak comes from the caching allocator, over all threads; the allocator's own peak is reset. Elsewhere the
    storages of all tensors that operations of this thread return are counted while they live. This includes every tensor of the
    model, of its backward pass and of the optimizer. Memory that one operation allocates and frees again is not counted. Nor is
    the release of an earlier tensor that no operation of the step touches: call ``zero_grad`` before the step, not in it.

    Args:
        step: Function that is called once. Its exceptions are passed on.
        device: Device of the tensors that count.

    Returns:
        Bytes, relative to the memory before the call.
    """
    device = torch.device(device)
    if device.type != "cuda":
        live = _LiveStorages(device)
        with _one_at_a_time, live:
            step()
        return live.peak
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize(device)
    return max(int(torch.cuda.max_memory_allocated(device)) - before, 0)


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A count of the bytes of the storages that operations return, until the storages are freed.

    torch.profiler counts in the allocator. But it prints to the terminal, fails where another profiler is active, and ends
    the process when two threads use it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = self.peak = 0  # relative to the beginning
        self.sizes: dict[int, tuple[int, weakref.ref[UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in self._storages((args, kwargs)):
            if id(storage) not in self.sizes:  # it is older than the step
                self._remember(storage)
        returned = func(*args, **kwargs)
        for storage in self._storages(returned):
            size, _ = self.sizes.get(id(storage), (0, None))
            self.now += storage.nbytes() - size  # a known storage may have been resized
            self._remember(storage)
        self.peak = max(self.peak, self.now)
        return returned

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self.sizes.clear()  # without weak references, no callback runs later

    def _remember(self, storage: UntypedStorage) -> None:
        key = id(storage)  # torch keeps the Python object for as long as the storage lives
        self.sizes[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._freed(key))

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, (0, None))[0]

    def _storages(self, tree: Any) -> list[UntypedStorage]:
        tensors = [
            leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device.type
        ]
        return [piece.untyped_storage() for piece in itertools.chain.from_iterable(map(_dense_pieces, tensors))]


def _dense_pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.strided:
        return (tensor,)
    return (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else ()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
