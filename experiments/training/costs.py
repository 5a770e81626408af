"""Time and memory of the steps of a run."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from balance.profiling import peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from balance import Report


class Costs:
    """Costs of a run, which begins when this object is created, or continues when its state is loaded."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.durations: list[float] = []  # of steps, in seconds
        self.peak = 0  # bytes that a step needs at most

    def measure_time(self, step: Callable[[], Report]) -> Report:
        """Make a step, and keep its duration."""
        begin = time.perf_counter()
        report = step()
        self.durations.append(time.perf_counter() - begin)
        return report

    def measure_memory(self, step: Callable[[], Report], device: str) -> Report:
        """Make a step, and keep the peak of its memory; its duration does not count, as the measurement is slow."""
        reports: list[Report] = []
        self.peak = peak_memory(lambda: reports.append(step()), device)
        return reports[0]

    def seconds(self) -> float:
        """Return the time since the run began."""
        return time.perf_counter() - self.begin

    def state_dict(self) -> dict[str, Any]:
        """Return the costs so far."""
        durations = torch.tensor(self.durations, dtype=torch.float64, device="cpu")
        return {"seconds": self.seconds(), "durations": durations, "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the time of a run that continues to its costs so far."""
        self.begin = time.perf_counter() - state["seconds"]
        self.durations, self.peak = state["durations"].tolist(), state["peak"]

    def metrics(self, seconds: float) -> dict[str, float]:
        """Return the costs as metrics: a step in milliseconds and MiB, and the whole run, which took these seconds."""
        step = {"cost/step_ms": 1000 * statistics.median(self.durations)} if self.durations else {}
        return step | {"cost/step_mib": self.peak / 2**20, "cost/run_s": seconds}
