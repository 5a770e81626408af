"""Steps of the multi-task agent: its environments, its critics with and without the stage, and everything together.

    python benchmarks/bench_agent.py [--sizes default MT10] [--source metaworld] [--budget 20]

A step of the critics is forward pass, backward pass and Adam on one batch; a step of `famo` also has its second forward pass.
All ratios are relative to a step with the sum of the losses and without the stage. ``MT10`` has the published networks, batch
and number of tasks. The clock is the wall clock, since environments work in other processes. All other programs should rest.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from record import FOLDER, write
from show import times_table
from timing import summaries, times_in_turns

sys.path.insert(0, str(FOLDER.parent))

from experiments.config.layers import configure
from experiments.problems import base as problems
from experiments.sweeps.runtime import one_step
from experiments.training.run import Run, build
from experiments.training.step import build_optimizer, compute_losses, train_step

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES: dict[str, list[str]] = {"default": [], "MT10": ["protocol=paper", "agent.random_steps=200", "agent.first_updates=0"]}
PLAIN = "critics without the stage"
STAGES = {
    "critics, ls": [],
    "critics, uw": ["loss_method=uw"],
    "critics, famo": ["loss_method=famo"],
    "critics, pcgrad": ["gradient_method=pcgrad"],
    "critics, cagrad": ["gradient_method=cagrad"],
    "critics, pcgrad, one pass for all tasks": ["gradient_method=pcgrad", "model.separate_passes=false"],
}
EPISODE = 150


class Steps:
    """Steps of one size by name, and the runs that they belong to."""

    def __init__(self, size: str, source: str) -> None:
        own = ["data.tasks=all"] if source == "points" else []
        self.words = ["experiment=metaworld", "train.lr=1e-12", "train.threads=1", "track=false", f"data.source={source}"]
        self.words += [*SIZES[size], *own]
        self.runs: list[Run] = []

    def run(self, *words: str) -> Run:
        """Return a new run."""
        self.runs.append(build(configure([*self.words, *words])))
        return self.runs[-1]

    def by_name(self) -> dict[str, Callable[[], object]]:
        """Return all steps; all steps of the critics have the same batch."""
        steps: dict[str, Callable[[], object]] = {}
        run = self.run()
        assert run.agent is not None
        batch = next(iter(run.agent))
        run.agent.after_step()
        steps[PLAIN] = partial(plain_step, run, build_optimizer(run), batch)
        for name, words in STAGES.items():
            staged = self.run(*words)
            steps[name] = partial(train_step, staged, build_optimizer(staged), batch)
        for place, processes in (("separate processes", "true"), ("one process", "false")):
            moving = self.run(f"data.processes={processes}")
            steps[f"environments in {place}"] = environment_step(moving)
            steps[f"whole step, ls, environments in {place}"] = one_step(self.run(f"data.processes={processes}"))
        return steps

    def close(self) -> None:
        """End all processes."""
        for run in self.runs:
            assert run.agent is not None
            run.agent.close()


def plain_step(run: Run, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """Make a step of the critics without the stage."""
    optimizer.zero_grad()
    torch.stack(list(compute_losses(run, batch)[1].values())).sum().backward()
    optimizer.step()


def environment_step(run: Run) -> Callable[[], object]:
    """Return a step of all environments with random actions; episodes begin anew after their usual length."""
    world: Any = run.data.train.world  # type: ignore[attr-defined]
    generator, tasks = np.random.default_rng(0), len(run.problem.TASKS)

    def step() -> None:
        simulation = world.simulation
        if not simulation.goals or len(simulation.actions) == EPISODE:
            simulation.begin([0] * tasks)
        simulation.step(generator.uniform(-1, 1, (tasks, simulation.action_size)).astype(np.float32))

    return step


def measure(size: str, source: str, budget: float) -> dict[str, dict[str, Any]]:
    """Return the rows of one size: milliseconds, ratios to the plain step, and steps per second."""
    steps = Steps(size, source)
    with problems.by_design():
        times = times_in_turns(steps.by_name(), lambda: None, warm_up=2, repeats=1000, budget=budget)
    steps.close()
    rows = summaries(times, PLAIN)
    return {name: row | {"per_second": round(1e3 / row["ms"], 1)} for name, row in rows.items()}


def main() -> None:
    """Measure the sizes, print the table and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--source", choices=("metaworld", "points"), default="metaworld", help="environments")
    parser.add_argument("--budget", type=float, default=20, help="seconds for each size")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for size in options.sizes:
        tasks = len(problems.tasks_of(configure(Steps(size, options.source).words)))
        results[f"{size} K={tasks}"] = measure(size, options.source, options.budget)
    print(times_table(results))
    write(results, "agent", options.output, threads="1")


if __name__ == "__main__":
    main()
