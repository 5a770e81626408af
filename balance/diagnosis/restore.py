"""Restoration of a user's model after a diagnosis."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from ..engine.accumulate import cleared_grads
from ..rules.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn


class Restoration:
    """Restore a model on exit: values, buffers, extra state, ``.grad``, ``requires_grad`` and modes, in the same tensors.

    Args:
        model: A model.
        shared: Further leaf tensors to restore, which the model may contain or not.
    """

    def __init__(self, model: nn.Module, shared: Sequence[Tensor]) -> None:
        self._leaves = {id(p): p for p in (*model.parameters(), *shared)}
        self._modes = [(module, module.training) for module in model.modules()]
        self._requires_grad = [(leaf, leaf.requires_grad) for leaf in self._leaves.values()]
        self._snapshot = Snapshot(model)
        self._shared = [(leaf, leaf.detach().clone()) for leaf in shared]
        self._gradients = ExitStack()

    def __enter__(self) -> Restoration:
        self._gradients.enter_context(cleared_grads(self._leaves.values()))
        return self

    def put_aside(self, leaves: Iterable[Tensor]) -> None:
        """Set ``.grad`` of further leaf tensors to None until exit."""
        new = {id(leaf): leaf for leaf in leaves if id(leaf) not in self._leaves}
        self._leaves |= new
        self._gradients.enter_context(cleared_grads(new.values()))

    def zero_grad(self) -> None:
        """Set ``.grad`` of all leaf tensors to None."""
        for leaf in self._leaves.values():
            leaf.grad = None

    @torch.no_grad()
    def __exit__(self, *raised: object) -> None:
        for module, training in self._modes:
            module.training = training
        self._snapshot.restore()
        for leaf, value in self._shared:
            leaf.copy_(value)
        for leaf, requires_grad in self._requires_grad:
            leaf.requires_grad_(requires_grad)
        self._gradients.close()
