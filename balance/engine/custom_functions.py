"""Functions that Python code defines in a graph, and what forbids to walk a graph once for each task.

A gradient balancer walks the part of the graph that tasks share once for each task. torch's own operations allow that. A
custom Function may not: it may add to ``.grad`` in its own backward pass, free what it needs, or change it in place.
"""

from __future__ import annotations

import gc
import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakTensorKeyDictionary

from balance.engine.accumulate import put_aside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableMapping, Sequence

    from balance.engine.passes import AtLosses

_SAME = 1e-3  # largest difference of a repeated pass, relative to the length of a gradient
_SAME_IN_HALF_PRECISION = 5e-2
_ONCE = (
    'Use balance.Splitter, or source="features" with this part below the features: both walk the shared part once. '
    "gradient=None needs no further pass at all."
)
_DONATED = (
    "A compiled function in the graph frees its saved tensors in its first backward pass (donated buffers), but a gradient "
    "balancer walks the graph once for each task. Set torch._functorch.config.donated_buffer = False before the function is "
    'compiled, or use balance.Splitter or source="features" with the compiled part below the features, which walk it once.'
)
_REENTRANT = (
    "A reentrant checkpoint (use_reentrant=True) in the graph accumulates gradients in its own backward pass, but a gradient "
    f"balancer must take the gradients of each task apart. Set use_reentrant=False. {_ONCE}"
)
_SHARDED = (
    "Parameters must not be sharded (DTensor, FSDP2), but a loss reaches some that are: their gradients are reduced over "
    "ranks by hooks of an ordinary backward pass only. Use balance.Splitter inside the model, or gradient=None."
)


_UNSHARDED: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()  # leaf tensors that belong to no shard


class Functions:
    """Checks of the functions that Python code defines, each kind once."""

    def __init__(self) -> None:
        self._checked: WeakSet[type] = WeakSet()

    @contextmanager
    def guarded(
        self, nodes: Sequence[Any], start: AtLosses, inputs: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> Iterator[None]:
        """Return a context for passes through a graph with such functions.

        Args:
            nodes: The nodes that Python code defines.
            start: Passes that begin at the losses.
            inputs: Tensors to differentiate with respect to.
            leaves: Leaf tensors whose ``.grad`` must not change in the passes.

        Raises:
            RuntimeError: If the graph cannot be walked once for each task; ``.grad`` is then as before.
        """
        refuse_reentrant(nodes)
        doubtful = [node for node in nodes if is_compiled(node) or is_foreign(node)]
        if not doubtful:
            yield
            return
        new = {type(node) for node in doubtful} - set(self._checked)
        if new:
            _check(start, inputs, leaves, [node for node in doubtful if type(node) in new])
            self._checked.update(new)
        with put_aside(leaves):
            yield
            accumulates = any(leaf.grad is not None for leaf in leaves)
        if accumulates:
            raise RuntimeError(_accumulating(doubtful))


def refuse_reentrant(nodes: Iterable[Any]) -> None:
    """Refuse reentrant checkpoints in the part of a graph that is walked once for each task.

    Raises:
        RuntimeError: If there is one; the message says what works.
    """
    if any(_source(node) is CheckpointFunction for node in nodes):
        raise RuntimeError(_REENTRANT)


def refuse_sharded(nodes: Iterable[Any], leaves: Iterable[Tensor]) -> None:
    """Refuse a graph of parameters that FSDP2 shards: captured gradients never reach the shards.

    Args:
        nodes: The nodes that Python code defines.
        leaves: Leaf tensors of the graph.

    Raises:
        RuntimeError: If it holds one; the message says what works.
    """
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")  # not imported: nothing is sharded
    if module is None or not torch.distributed.is_initialized():
        return
    reduces = any(_source(node).__name__ == "RegisterPostBackwardFunction" for node in nodes)
    # During a step a sharded parameter is replaced by an ordinary one, which only FSDP's own records tell apart
    new = [leaf for leaf in leaves if leaf not in _UNSHARDED]
    gathered = {
        id(getattr(thing, "_unsharded_param", None))
        for thing in (gc.get_objects() if new else ())
        if type(thing) is module.FSDPParam
    }
    if reduces or any(id(leaf) in gathered for leaf in new):
        raise RuntimeError(_SHARDED)
    for leaf in new:
        _UNSHARDED[leaf] = True


def walks_once(nodes: Iterable[Any]) -> bool:
    """Whether a graph holds functions that may need an ordinary backward pass, in which every leaf accumulates."""
    return any(is_foreign(node) or _source(node) is CheckpointFunction for node in nodes)


def is_compiled(node: Any) -> bool:
    """Whether a node runs the backward pass of a function that torch.compile has made."""
    return _source(node).__name__ == "CompiledFunction"


def is_foreign(node: Any) -> bool:
    """Whether the code of a node comes from outside torch."""
    return not _source(node).__module__.startswith("torch.")


def explained(passes: Iterable[Sequence[Tensor | None]]) -> Iterator[Sequence[Tensor | None]]:
    """Yield the gradients of one pass after the other.

    Raises:
        RuntimeError: If a pass fails because the graph cannot be walked once for each task.
    """
    count = 0
    try:
        for found in passes:
            yield found
            count += 1
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        message = _explanation(error)
        if message is None and count == 0:
            raise
        raise RuntimeError(
            message
            or f"A gradient balancer walks the graph once for each task, but after {count} backward passes the next one "
            f"failed: {error}. An operation in the graph can be walked only once. {_ONCE}"
        ) from error


def _source(node: Any) -> type:
    source: type = getattr(type(node), "_forward_cls", type(node))
    return source


def _explanation(error: Exception) -> str | None:
    if "donated buffer" in str(error):
        return _DONATED
    return _REENTRANT if "use_reentrant" in str(error) else None


def _check(start: AtLosses, inputs: Sequence[Tensor], leaves: Sequence[Tensor], nodes: Sequence[Any]) -> None:
    """Run one pass twice, and compare what arrives.

    Raises:
        RuntimeError: If the second pass fails or finds other gradients, or a pass adds to ``.grad`` of any parameter.
    """
    others = _parameters() if any(map(is_foreign, nodes)) else []
    before = [(parameter, parameter.grad, _version(parameter.grad)) for parameter in others]
    with put_aside(leaves):
        try:
            first, second = explained(_twice(start, inputs))
            accumulates = any(leaf.grad is not None for leaf in leaves)
        finally:
            known = {id(leaf) for leaf in leaves}
            changed = [
                (parameter, gradient)
                for parameter, gradient, version in before
                if id(parameter) not in known and (parameter.grad is not gradient or _version(gradient) != version)
            ]
            for parameter, gradient in changed:
                parameter.grad = gradient
    if accumulates or changed:
        raise RuntimeError(_accumulating(nodes))
    if not all(map(_is_same, first, second)):
        raise RuntimeError(
            f"{_names(nodes)} found other gradients when walked a second time, but a gradient balancer walks the graph once "
            "for each task. Its backward pass changes what it has saved (donated buffers of a compiled function that comes "
            "from a cache do so too: clear the cache after setting torch._functorch.config.donated_buffer = False), or draws "
            f"random numbers. {_ONCE}"
        )


def _twice(start: AtLosses, inputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    for _ in range(2):
        outputs, gradients = start.together([1.0] * start.num_tasks)
        yield torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]


def _parameters() -> list[nn.Parameter]:
    """Return every parameter that exists: a Function can reach some that neither the graph nor the user names."""
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter))
    return [parameter for parameter in found if parameter.is_leaf and parameter.requires_grad]


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.to_dense().to(wide), second.to_dense().to(wide)
    limit = _SAME if first.dtype in (torch.float32, torch.float64, torch.complex64) else _SAME_IN_HALF_PRECISION
    difference, length = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a))
    return difference <= limit * length or math.isnan(difference)  # a later check refuses NaN


def _accumulating(nodes: Sequence[Any]) -> str:
    return (
        f"{_names(nodes)} adds to .grad of parameters in its own backward pass, as reversible blocks do, but a gradient "
        f"balancer walks the graph once for each task: .grad would get the plain sum of all tasks. {_ONCE}"
    )


def _names(nodes: Sequence[Any]) -> str:
    names = sorted({_source(node).__qualname__ for node in nodes})
    return f"The function {' or '.join(names)} in the graph"
