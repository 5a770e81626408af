"""Functions that Python code defines in a graph, and the checks that a graph can be walked once for each task.

A gradient balancer walks the part of the graph that tasks share once for each task. torch's own operations allow this. A
custom Function may not: it may add to ``.grad`` in its backward pass, free what it needs, or change it in place.
"""

from __future__ import annotations

import gc
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .accumulate import cleared_grads

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .passes import LossOutputs

_TOLERANCE = 1e-3  # largest difference of a repeated pass, relative to the length of a gradient
_TOLERANCE_IN_HALF_PRECISION = 5e-2
_REMEDY = (
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
    f"balancer must separate the gradients of the tasks. Set use_reentrant=False. {_REMEDY}"
)


class FunctionChecks:
    """Checks of the functions that Python code defines, each kind of function once."""

    def __init__(self) -> None:
        self._checked: WeakSet[type] = WeakSet()

    @contextmanager
    def guarded(
        self, nodes: Sequence[Any], outputs: LossOutputs, targets: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> Iterator[None]:
        """Return a context for passes through a graph with such functions.

        Args:
            nodes: The nodes that Python code defines.
            outputs: The losses.
            targets: Tensors to differentiate with respect to.
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
            _check(outputs, targets, leaves, [node for node in doubtful if type(node) in new])
            self._checked.update(new)
        with cleared_grads(leaves):
            yield
            accumulates = any(leaf.grad is not None for leaf in leaves)
        if accumulates:
            raise RuntimeError(_accumulation_message(doubtful))


def refuse_reentrant(nodes: Iterable[Any]) -> None:
    """Refuse reentrant checkpoints in the part of a graph that is walked once for each task.

    Args:
        nodes: The nodes that Python code defines.

    Raises:
        RuntimeError: If a node is a reentrant checkpoint; the message contains the remedy.
    """
    if any(_origin(node) is CheckpointFunction for node in nodes):
        raise RuntimeError(_REENTRANT)


def needs_ordinary_pass(nodes: Iterable[Any]) -> bool:
    """Return whether a graph contains functions that may need an ordinary backward pass, in which every leaf accumulates.

    Args:
        nodes: The nodes that Python code defines.
    """
    return any(is_foreign(node) or _origin(node) is CheckpointFunction for node in nodes)


def is_compiled(node: Any) -> bool:
    """Return whether a node runs the backward pass of a function that torch.compile has made."""
    return _origin(node).__name__ == "CompiledFunction"


def is_foreign(node: Any) -> bool:
    """Return whether the code of a node comes from outside torch."""
    return not _origin(node).__module__.startswith("torch.")


def with_explained_errors(passes: Iterable[Sequence[Tensor | None]]) -> Iterator[Sequence[Tensor | None]]:
    """Yield the gradients of one pass after the other, and name the cause and the remedy if a pass fails.

    Args:
        passes: By pass, its gradients; computed on demand.

    Raises:
        RuntimeError: If a pass fails because the graph cannot be walked once for each task.
    """
    count = 0
    try:
        for gradients in passes:
            yield gradients
            count += 1
    except Exception as error:
        message = _explanation(error, count)
        if message is None:
            raise
        raise RuntimeError(message) from error


def _explanation(error: Exception, passes_before: int) -> str | None:
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if "donated buffer" in str(error):
        return _DONATED
    if "use_reentrant" in str(error):
        return _REENTRANT
    if passes_before == 0:
        return None
    return (
        f"A gradient balancer walks the graph once for each task, but after {passes_before} backward passes the next one "
        f"failed: {error}. An operation in the graph can be walked only once. {_REMEDY}"
    )


def _check(outputs: LossOutputs, targets: Sequence[Tensor], leaves: Sequence[Tensor], nodes: Sequence[Any]) -> None:
    """Run one pass twice, and compare the gradients that arrive.

    Raises:
        RuntimeError: If the second pass fails or computes other gradients, or a pass adds to ``.grad`` of any parameter.
    """
    known = {id(leaf) for leaf in leaves}
    others = [leaf for leaf in _all_parameters() if id(leaf) not in known] if any(map(is_foreign, nodes)) else []
    before = [(leaf, leaf.grad, _version(leaf.grad)) for leaf in others]
    with cleared_grads(leaves):
        try:
            first, second = with_explained_errors(_two_passes(outputs, targets))
            accumulates = any(leaf.grad is not None for leaf in leaves)
        finally:
            changed = [(leaf, grad) for leaf, grad, version in before if leaf.grad is not grad or _version(grad) != version]
            for leaf, grad in changed:
                leaf.grad = grad
    if accumulates or changed:
        raise RuntimeError(_accumulation_message(nodes))
    if not all(map(_is_close, first, second)):
        raise RuntimeError(
            f"{_names(nodes)} found other gradients when walked a second time, but a gradient balancer walks the graph once "
            "for each task. Its backward pass changes what it has saved (donated buffers of a compiled function that comes "
            "from a cache do so too: clear the cache after setting torch._functorch.config.donated_buffer = False), or draws "
            f"random numbers. {_REMEDY}"
        )


def _two_passes(outputs: LossOutputs, targets: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    for _ in range(2):
        roots, values = outputs.weighted_cotangents([1.0] * outputs.num_tasks)
        yield torch.autograd.grad(roots, targets, values, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]


def _all_parameters() -> list[nn.Parameter]:
    """Return every parameter that exists: a Function can reach some that neither the graph nor the user names."""
    parameters = (instance for instance in gc.get_objects() if issubclass(type(instance), nn.Parameter))
    return [parameter for parameter in parameters if parameter.is_leaf and parameter.requires_grad]


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version


def _is_close(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    wide = torch.complex128 if first.is_complex() else torch.float64
    a, b = first.to_dense().to(wide), second.to_dense().to(wide)
    is_precise = first.dtype in (torch.float32, torch.float64, torch.complex64)
    limit = _TOLERANCE if is_precise else _TOLERANCE_IN_HALF_PRECISION
    difference, length = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(a))
    return difference <= limit * length or math.isnan(difference)  # a later check refuses NaN


def _accumulation_message(nodes: Sequence[Any]) -> str:
    return (
        f"{_names(nodes)} adds to .grad of parameters in its own backward pass, as reversible blocks do, but a gradient "
        f"balancer walks the graph once for each task: .grad would get the plain sum of all tasks. {_REMEDY}"
    )


def _names(nodes: Sequence[Any]) -> str:
    names = sorted({_origin(node).__qualname__ for node in nodes})
    return f"The function {' or '.join(names)} in the graph"


def _origin(node: Any) -> type:
    """Return the class that defines the function of a node."""
    origin: type = getattr(type(node), "_forward_cls", type(node))
    return origin
