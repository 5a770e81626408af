"""Checks of the values that a rule gets: at once, or on an accelerator, so that no step waits for the device.

A rule that reads a value on the host waits until the device has computed it. So the stage can run a loss balancer with
`DelayedChecks`. The rule then stays on the device of the losses, and its checks are tensors. The host reads their result one
call later.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def waits(device: torch.device) -> bool:
    """Return whether reading a value of a device on the host waits for the device. mps has no float64, so rules leave it."""
    return device.type not in ("cpu", "mps")


class DelayedChecks:
    """Checks that are made on a device. Inside of the context `delay` adds checks here."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Callable[[], Exception | None]]] = []
        self._arrival: Arrival | None = None

    def __enter__(self) -> None:
        self._outer, _current.checks = _current.checks, self

    def __exit__(self, *_: object) -> None:
        _current.checks = self._outer

    def add(self, passed: Tensor, error: Callable[[], Exception | None]) -> None:
        """Add a check.

        Args:
            passed: Whether it has passed, on the device. Any shape; all entries must be true.
            error: Makes the error of a check that has failed; None: a failure is no error.
        """
        self._made.append((passed, error))

    def close(self, device: torch.device) -> Tensor:
        """Return whether all checks have passed, on the device, and send the result to the host. Shape ()."""
        if not self._made:
            return torch.ones((), dtype=torch.bool, device=device)
        passed = torch.cat([passed.reshape(-1) for passed, _ in self._made]).all()
        self._arrival = Arrival(passed)
        return passed

    def result(self) -> tuple[bool, Exception | None]:
        """Return whether all checks have passed, once the result has arrived, and the first error."""
        if self._arrival is None or self._arrival.value():
            return True, None
        errors = (error() for passed, error in self._made if not bool(passed.all()))
        return False, next((error for error in errors if error is not None), None)


class Arrival:
    """A truth value on its way from a device to the host, behind the work that computes it and before any later work.

    Args:
        flag: Shape ().
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._event = flag, None
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == flag.device.type:
            self._flag = flag.to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.Event(flag.device)
            self._event.record(torch.accelerator.current_stream(flag.device))

    def value(self) -> bool:
        """Return the value. The device continues with later work meanwhile."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class _Current(threading.local):
    checks: DelayedChecks | None = None


_current = _Current()


def are_delayed() -> bool:
    """Return whether the checks of the rule that runs are delayed, so that it must not read values on the host."""
    return _current.checks is not None


def delay(passed: Tensor, error: Callable[[], Exception | None]) -> None:
    """Add a check to the delayed checks of the rule that runs; see `DelayedChecks.add`."""
    assert _current.checks is not None
    _current.checks.add(passed, error)


def beside(tensor: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on the device of another one, in its dtype or a given one, without waiting for a copy from the host."""
    return tensor.to(other.device, dtype or other.dtype, non_blocking=tensor.device.type == "cpu")
