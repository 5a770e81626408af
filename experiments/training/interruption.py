"""Requests to stop, by SIGTERM or Ctrl-C, which a run obeys after its current step."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.training import ranks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

HANDLERS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # of a second signal

_received: list[int] = []  # signals in the context `noted`


class Interrupted(KeyboardInterrupt):
    """A run ends early, because a signal has requested it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number  # as shells have it


@contextmanager
def noted() -> Iterator[None]:
    """Note the first SIGTERM or SIGINT. A second signal ends the process at once; ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # other threads cannot handle signals
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLERS if signal.getsignal(number) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _note)
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(number)
    for other, handler in HANDLERS.items():
        signal.signal(other, handler)


def received() -> int:
    """Return the number of the signal that any rank has received; 0 for none. Every rank must call it."""
    return ranks.largest(received_here())


def received_here() -> int:
    """Return the number of the signal that this rank has received; 0 for none."""
    return max(_received, default=0)
