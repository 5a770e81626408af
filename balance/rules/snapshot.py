"""Snapshot of the state of rules, restored after a failed step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class Snapshot:
    """Values of all buffers, parameters and extra state of some modules, to be restored in place.

    Args:
        rules: Rules; those that are no modules have no state that could be restored.
    """

    def __init__(self, *rules: object) -> None:
        modules = [module for rule in rules if isinstance(rule, nn.Module) for module in rule.modules()]
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]
        self._parameters = [
            (parameter, parameter.detach().clone())
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._extra: list[tuple[nn.Module, Any]] = [
            (module, module.get_extra_state()) for module in modules if _has_extra_state(module)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Set everything back, in the same tensors."""
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            _copy(buffer, value)
        for parameter, value in self._parameters:
            _copy(parameter, value)
        for module, state in self._extra:
            module.set_extra_state(state)


@contextmanager
def restored_on_error(*rules: object) -> Iterator[None]:
    """Restore the state of the given rules if the body raises, so that a failed step leaves no trace."""
    snapshot = Snapshot(*rules)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def _has_extra_state(module: nn.Module) -> bool:
    default: Callable[..., Any] = nn.Module.get_extra_state
    return type(module).get_extra_state is not default


def _copy(tensor: Tensor | None, value: Tensor | None) -> None:
    # Unchanged tensors are not written, so that their version counters stay as they are
    if tensor is not None and value is not None and not torch.equal(tensor, value):
        tensor.copy_(value)
