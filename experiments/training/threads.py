"""Threads of torch on the CPU: their number in one run, and in several runs at a time.

A step of a small network has many short operations, and all threads of an operation wait for the slowest thread. A thread that
shares its core with another program delays all threads. So next to a busy process two threads take about twice as long as one.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import joblib
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from omegaconf import DictConfig


def cores() -> int:
    """Return the number of cores that this process may use."""
    return int(joblib.cpu_count())  # respects the limits of containers and of taskset


def share(workers: int) -> int:
    """Return the number of cores for each of several runs at a time, at least one."""
    return max(1, cores() // workers)


def use(number: int | None) -> None:
    """Let torch compute with a number of threads. None leaves the number as it is."""
    if number is not None:
        torch.set_num_threads(number)


@contextmanager
def restored() -> Iterator[None]:
    """Restore the number of threads on exit."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def runs_at_a_time(configs: Sequence[DictConfig], requested: int | None) -> int:
    """Return the number of runs at a time on this machine.

    Args:
        configs: Configurations of the runs.
        requested: Number that the user requests; None for as many as have a core for each of their threads.

    Raises:
        ValueError: If the requested runs have several threads each, and more threads than there are cores.
    """
    threads = max(config.train.threads or 1 for config in configs)
    if requested is None:
        return share(threads)
    if requested > 1 and threads > share(requested):
        raise ValueError(
            f"--jobs must be at most {share(threads)} with train.threads={threads} on {cores()} cores, but got {requested}. "
            "Leave out --jobs, or set train.threads=1."
        )
    return requested
