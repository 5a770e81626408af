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
        stage: A module of which only its own buffers count, not its children.
    """

    def __init__(self, *rules: object, stage: nn.Module | None = None) -> None:
        modules = modules_of(*rules)
        self._buffers = [
            (module, name, buffer, None if buffer is None else _clone(buffer))
            for module in (modules if stage is None else [*modules, stage])
            if module._buffers
            for name, buffer in module._buffers.items()
        ]
        self._parameters = [
            (parameter, _clone(parameter))
            for module in modules
            if module._parameters
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._extra: list[tuple[nn.Module, Any]] = [
            (module, module.get_extra_state()) for module in modules if _has_extra_state(module)
        ]

    def restore(self) -> None:
        """Set everything back, in the same tensors."""
        self.restore_learned()
        with torch.no_grad():
            for parameter, value in self._parameters:
                _copy(parameter, value)

    @torch.no_grad()
    def restore_learned(self) -> None:
        """Set everything back except for parameters, which an optimizer may have changed since."""
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            _copy(buffer, value)
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


def modules_of(*roots: object) -> list[nn.Module]:
    """Return the modules among some objects, with all their children, each once: `nn.Module.modules` without the names."""
    queue = [root for root in roots if isinstance(root, nn.Module)]
    found = set(map(id, queue))
    for module in queue:  # which grows
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found.add(id(child))
                queue.append(child)
    return queue


def parameters_of(*roots: object) -> list[nn.Parameter]:
    """Return the parameters of some modules and of all their children, each once, as `nn.Module.parameters` does."""
    found: dict[int, nn.Parameter] = {}
    for module in modules_of(*roots):
        if module._parameters:
            found |= {id(p): p for p in module._parameters.values() if p is not None}
    return list(found.values())


def move_buffers(device: torch.device, *modules: nn.Module) -> None:
    """Move the buffers of floats to a device. Other buffers are counters that rules read on the host."""
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device and buffer.is_floating_point():
                module._buffers[name] = buffer.to(device, non_blocking=buffer.device.type == "cpu")


def _has_extra_state(module: nn.Module) -> bool:
    default: Callable[..., Any] = nn.Module.get_extra_state
    return type(module).get_extra_state is not default


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.requires_grad else tensor.clone()


def _copy(tensor: Tensor | None, value: Tensor | None) -> None:
    # Unchanged tensors are not written, so that their version counters stay as they are
    if tensor is not None and value is not None and not torch.equal(tensor, value):
        tensor.copy_(value)
