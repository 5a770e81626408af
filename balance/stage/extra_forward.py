"""Forward passes in addition to the training step, which leave the model and the random numbers unchanged."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .learning import LearningStage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class _Buffer(NamedTuple):
    """A buffer, and its value before the context."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor


@contextmanager
def extra_forward(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random number generators after forward passes that are not part of the training step.

    Use it for the losses that ``observe`` takes, so that the second forward pass on a batch does not change the statistics of
    batch normalisation::

        with balance.extra_forward(model), torch.no_grad():
            balancer.observe(task_losses())

    On exit, also after an error, the buffers of the model are the tensors that they were, with the values that they had. The
    generators of the host, of the model's devices and of the current CUDA device continue as if nothing had been drawn. So
    the next step draws the numbers that it would have drawn. Parameters and modes are not restored, and neither is a balancer
    inside of the model, which learns from ``observe``.

    Args:
        model: The model; a wrapper such as DistributedDataParallel is allowed.

    Yields:
        Nothing.

    Raises:
        TypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}. Give the module that is called.")
    buffers = _buffers(model)
    devices = _devices(model)
    host, states = torch.get_rng_state(), [_generators(device).get_rng_state(*_index(device)) for device in devices]
    try:
        yield
    finally:
        torch.set_rng_state(host)
        for device, state in zip(devices, states, strict=True):
            _generators(device).set_rng_state(state, *_index(device))
        for buffer in buffers:
            _restore(buffer)


def _buffers(model: nn.Module) -> list[_Buffer]:
    stages = [module for module in model.modules() if isinstance(module, LearningStage)]
    learning = {id(module) for stage in stages for module in stage.modules()}
    return [
        _Buffer(module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and id(module) not in learning
    ]


@torch.no_grad()
def _restore(record: _Buffer) -> None:
    """Set a buffer back.

    A graph whose backward pass is still to come may have saved it. So the version counter is not changed: the values are equal
    to the saved values.
    """
    module, name, buffer, value = record
    module._buffers[name] = buffer
    if not torch.equal(buffer, value):
        buffer.data.copy_(value)


def _devices(model: nn.Module) -> list[torch.device]:
    """Return the accelerators whose generators the model can use."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return [device for device in devices if hasattr(getattr(torch, device.type, None), "get_rng_state")]


def _generators(device: torch.device) -> Any:
    """Return the module of torch with the generators of a type of device."""
    return getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps has one generator
