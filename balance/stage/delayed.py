"""Calls of a loss balancer whose losses stay on an accelerator: the host reads the result of their checks one call later."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from ..rules.checks import DelayedChecks
from ..rules.context import TaskError
from ..rules.snapshot import Snapshot, modules_of, move_buffers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from ..rules.protocol import LossBalancer

_LATE = (
    ' The error belongs to an earlier call, whose gradients were set to zero; Balancer(..., checks="now") raises it at once, '
    "but waits for the device at every step."
)


class DelayedCall:
    """One call of a loss balancer on the device of the losses.

    If a check fails, the gradients of the step are zero. The rule's state is restored when the host reads the result, before
    any further call and before the state is saved.

    Args:
        stage: The stage, whose sums of the losses are part of the state.
        rule: The loss balancer. Its buffers of floats move to the device, once.
        device: Device of the losses.
        tasks: Names of the tasks, for messages.

    Attributes:
        checks: The context in which the rule runs.
        passed: Whether all checks have passed, after `close`. Shape ().
    """

    passed: Tensor

    def __init__(self, stage: nn.Module, rule: LossBalancer, device: torch.device, tasks: Sequence[str]) -> None:
        move_buffers(device, stage, *modules_of(rule))
        self._state = Snapshot(rule, stage=stage)
        self._device, self._tasks, self._replacement = device, tasks, 0.0
        self.checks = DelayedChecks()

    def finite(self, losses: Tensor, *, skips: bool = False) -> Tensor:
        """Return losses with 1 in place of those that are infinite or NaN, after a check. Shape (K,).

        Args:
            losses: With their graph. Shape (K,).
            skips: Whether a gradient scaler skips steps whose losses are not finite, which are then no error.
        """
        raw = losses.detach()
        finite = raw.isfinite()
        self._replacement = math.nan if skips else 0.0
        self.checks.add(finite, lambda: None if skips else not_finite_error(self._tasks, raw.tolist()))
        return torch.where(finite, losses, 1.0)

    def close(self) -> None:
        """Add up the checks, and send the result to the host."""
        self.passed = self.checks.close(self._device)

    def restore(self) -> None:
        """Set the whole state back, after an error of the call itself."""
        self._state.restore()

    def backward(self, total: Tensor, guarded: Iterable[Tensor]) -> None:
        """Run the backward pass of a scalar, without gradients if a check has failed.

        Args:
            total: The scalar, which is replaced by zero if a check has failed. Shape ().
            guarded: Tensors in its graph. Their gradients, which can be NaN even so, are replaced: by zero, or by NaN if a
                gradient scaler skips the step.
        """

        def guard(gradient: Tensor) -> Tensor:
            return torch.where(self.passed.to(gradient.device), gradient, self._replacement)

        with ExitStack() as stack:
            for tensor in guarded:
                if tensor.requires_grad:
                    stack.callback(tensor.register_hook(guard).remove)  # type: ignore[no-untyped-call]
            torch.where(self.passed, total, 0.0).backward()  # type: ignore[no-untyped-call]

    def error(self) -> Exception | None:
        """Return the error of a check that has failed, after the state has been restored; None: all have passed."""
        passed, error = self.checks.result()
        if passed:
            return None
        self._state.restore_learned()
        if isinstance(error, TaskError):
            error = ValueError(error.naming(self._tasks[error.task]))
        return None if error is None else type(error)(f"{error}{_LATE}")


def not_finite_error(tasks: Sequence[str], losses: Sequence[float]) -> ValueError:
    """Return the error of losses that are infinite or NaN."""
    bad = {task: value for task, value in zip(tasks, losses, strict=True) if not math.isfinite(value)}
    return ValueError(
        f"Losses must be finite, but got {bad}. Look at the data and the learning rate. If NaN marks a task without "
        'labels, give Balancer(..., nan="absent").'
    )
