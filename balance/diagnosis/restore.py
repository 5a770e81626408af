"""A model that is put back as it was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn


class AsFound:
    """Puts a model back as it was found: in place, so that whoever holds its tensors sees nothing."""

    def __init__(self, model: nn.Module, shared: Sequence[Tensor]) -> None:
        parameters = {id(p): p for p in (*model.parameters(), *shared)}.values()
        self.modes = [(module, module.training) for module in model.modules()]
        self.parameters = [(p, p.detach().clone(), p.requires_grad) for p in parameters]
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self.gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __enter__(self) -> AsFound:
        self.adopt([parameter for parameter, _, _ in self.parameters])
        return self

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Take the gradients of further leaves into care."""
        for tensor in tensors:
            if id(tensor) not in self.gradients:
                self.gradients[id(tensor)] = tensor, tensor.grad
                tensor.grad = None

    def clear(self) -> None:
        """Drop the gradients that have come since."""
        for tensor, _ in self.gradients.values():
            tensor.grad = None

    @torch.no_grad()
    def __exit__(self, *raised: object) -> None:
        for module, training in self.modes:
            module.training = training
        for parameter, value, requires_grad in self.parameters:
            parameter.copy_(value)
            parameter.requires_grad_(requires_grad)
        for module, name, buffer, content in self.buffers:
            module._buffers[name] = buffer
            if buffer is not None and content is not None:
                buffer.copy_(content)
        for leaf, gradient in self.gradients.values():
            leaf.grad = gradient
