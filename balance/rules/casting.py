"""Moves and casts of a module, which leave the state of its rules unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def preserving(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn`` without its effect on values, and on the dtype of buffers; for the ``_apply`` of a module.

    So ``.half()`` and ``.double()`` cast parameters and leave float64 state alone, and ``.to_empty()`` moves tensors with
    their values.

    Args:
        module: The module that is moved or cast, together with its children.
        fn: The function that ``nn.Module.to`` and its relatives apply to every parameter, gradient and buffer.
    """
    buffers = {id(buffer): buffer for buffer in module.buffers()}  # references, so that no other tensor gets their ids

    def moved(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        dtype = tensor.dtype if id(tensor) in buffers else changed.dtype
        return (changed if tensor.is_meta else tensor).to(device=changed.device, dtype=dtype)

    return moved
