"""Time of a training step of each problem over the number of threads, on idle cores and next to a busy process.

    python benchmarks/bench_threads.py [--problems digits toy] [--threads 1 2] [--seconds 2]

A step is one step of the trainer with `imtl`, on the first training batch, with a learning rate of almost zero. A step of an
agent includes environments and further networks. The busy process counts in a loop, on the last core that this process may
use. All other programs should rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from record import FOLDER, write
from show import threads_table

sys.path.insert(0, str(FOLDER.parent))

from experiments.config.layers import configure
from experiments.problems import base as problems
from experiments.sweeps.runtime import one_step
from experiments.training.run import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BUSY = ", busy"  # end of the names of rows next to a busy process
TURNS = 3


def training_step(name: str) -> Callable[[], object]:
    """Return a step of the trainer on the first batch of a problem."""
    config = configure([f"experiment={name}", "gradient_method=imtl", "train.lr=1e-12", "track=false"])
    return one_step(build(config))


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that uses all of the last core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def times(step: Callable[[], object], threads: Sequence[int], seconds: float) -> dict[int, list[float]]:
    """Return milliseconds of the steps by number of threads; the numbers take turns, each for some seconds in all."""
    milliseconds: dict[int, list[float]] = {number: [] for number in threads}
    for _ in range(TURNS):
        for number in threads:
            torch.set_num_threads(number)
            step()  # also starts the threads
            end = time.perf_counter() + seconds / TURNS
            while True:
                begin = time.perf_counter()
                step()
                milliseconds[number].append(1e3 * (time.perf_counter() - begin))
                if time.perf_counter() >= end:
                    break
    return milliseconds


def measure(name: str, threads: Sequence[int], seconds: float) -> dict[str, dict[str, Any]]:
    """Return the median of a step of a problem, by number of threads and load."""
    step, rows = training_step(name), {}
    with problems.by_design():
        quiet = times(step, threads, seconds)
        with busy_process():
            busy = times(step, threads, seconds)
    for ending, by_number in (("", quiet), (BUSY, busy)):
        for number, row in by_number.items():
            label = f"{number} thread{'s' if number > 1 else ''}{ending}"
            rows[label] = {"ms": round(median(row), 3), "least_ms": round(min(row), 3), "repeats": len(row)}
    return rows


def main() -> None:
    """Measure all problems, print the table and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=problems.names(), default=problems.names())
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2, help="time for each number of threads")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {}
    for name in options.problems:
        results[name] = measure(name, options.threads, options.seconds)
        print(name, {label: row["ms"] for label, row in results[name].items()}, flush=True)
    print("", threads_table(results), sep="\n")
    write(results, "threads", options.output, threads=" and ".join(map(str, options.threads)))


if __name__ == "__main__":
    main()
