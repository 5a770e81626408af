"""Gradients of the balancer's own parameters between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..rules.checks import waits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class _Record(NamedTuple):
    """A parameter as a step has left it."""

    gradient: int  # id of its ``.grad``
    version: int
    value: Any  # a number, where it is one on the host, or a tensor
    skipped: bool  # whether the scaler was to skip the step


class OwnGradients:
    """Memory of the gradients that a step leaves in the balancer's parameters.

    A training loop may know the model's parameters only and never clear these gradients. So the next step clears gradients
    that an optimizer has used, or that belong to a skipped step.
    """

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}  # by id of the parameter

    def clear_used(self, parameters: Sequence[Tensor], *, are_all_present: bool = False) -> list[tuple[Tensor, Tensor | None]]:
        """Set used gradients to None.

        Args:
            parameters: The balancer's parameters.
            are_all_present: Whether the step has all tasks, so that every parameter will get a gradient. Then a gradient on an
                accelerator is multiplied by zero in place of a wait for the device.

        Returns:
            The parameters and their ``.grad`` before, for `restore`.
        """
        before = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, gradient in before:
            record = self._records.get(id(parameter))
            if gradient is None or record is None or record.gradient != id(gradient):
                continue
            if record.skipped or record.version != parameter._version:
                parameter.grad = None
            # Fused optimizers do not count as a new version, so the values decide
            elif are_all_present and waits(parameter.device):
                parameter.grad = torch.where((record.value == parameter.detach()).all(), gradient, 0.0)
            elif not _is_equal(parameter, record.value):
                parameter.grad = None
        return before

    def remember(self, parameters: Sequence[Tensor], *, skipped: bool) -> None:
        """Remember the parameters as a step has left them."""
        self._records = {id(p): _Record(id(p.grad), p._version, _value(p), skipped) for p in parameters if p.requires_grad}


def _value(parameter: Tensor) -> Any:
    return parameter.item() if parameter.is_cpu and parameter.numel() == 1 else parameter.detach().clone()


def _is_equal(parameter: Tensor, value: Any) -> bool:
    return torch.equal(value, parameter) if isinstance(value, torch.Tensor) else bool(parameter.item() == value)


def restore(before: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Set ``.grad`` of parameters back."""
    for parameter, gradient in before:
        parameter.grad = gradient
