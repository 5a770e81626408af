"""The interface of loggers, and several loggers as one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Logger(Protocol):
    """A place for the records of a run: `balance.tracking.Tracker`, `TensorBoard`, `WandB`, `Loggers`, or a class of a user."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""

    def log_text(self, text: str, file: str) -> None:
        """Record a text under the name of a file."""

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record a file, in ``folder`` among the files of the run, or at the top for None."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record values that describe the run as a whole."""

    def close(self, status: Status = "FINISHED") -> None:
        """Write everything and end the run; a closed logger can be closed again."""


class Loggers:
    """Several loggers as one, and a context manager that closes them with the status of the run.

    Args:
        loggers: Any number of loggers.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.loggers = tuple(loggers)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(status_of(kind))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def log_text(self, text: str, file: str) -> None:
        """Record a text under the name of a file."""
        for logger in self.loggers:
            logger.log_text(text, file)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record a file, in ``folder`` among the files of the run, or at the top for None."""
        for logger in self.loggers:
            logger.log_file(file, folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record values that describe the run as a whole."""
        for logger in self.loggers:
            logger.set_tags(tags)

    def close(self, status: Status = "FINISHED") -> None:
        """Close all loggers, also if one of them raises an error."""
        with ExitStack() as stack:
            for logger in reversed(self.loggers):
                stack.callback(logger.close, status)


def status_of(kind: type[BaseException] | None) -> Status:
    """Return the status of a run that an exception of a type has ended; None for no exception."""
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
