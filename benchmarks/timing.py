"""Times of several steps that take turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FEWEST, MOST = 2, 200  # turns under a time budget


def times_in_turns(
    steps: Mapping[str, Callable[[], object]],
    prepare: Callable[[], object],
    *,
    warm_up: int = 0,
    repeats: int = MOST,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time steps in turns.

    Args:
        steps: Steps by name.
        prepare: Called before each step, outside of its time.
        warm_up: Turns that are not timed.
        repeats: Timed turns, at most.
        budget: Seconds after which no further turn begins, but for the fewest that a median needs.
        clock: Clock of the steps, in seconds; `time.thread_time` leaves out what other programs do.

    Returns:
        Milliseconds of all turns, by step.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for turn in range(warm_up + repeats):
        if turn >= warm_up + FEWEST and time.perf_counter() - begin >= budget:
            break
        for name, step in steps.items():
            prepare()
            start = clock()
            step()
            if turn >= warm_up:
                times[name].append(1e3 * (clock() - start))
    return times


def summaries(times: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Return median, quartile distance, number of turns and ratio to the baseline of every step."""
    base = statistics.median(times[baseline])
    rows = {}
    for name, milliseconds in times.items():
        quartiles = statistics.quantiles(milliseconds, n=4)
        rows[name] = {
            "ms": round(statistics.median(milliseconds), 3),
            "spread_ms": round(quartiles[2] - quartiles[0], 3),
            "repeats": len(milliseconds),
            "ratio": round(statistics.median(milliseconds) / base, 3),
        }
    return rows
