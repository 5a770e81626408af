"""Train a fan of preferences between two tasks, and draw the fronts of the methods.

python experiments/front.py --experiment=multimnist --loss_method=ls,stch --gradient_method=none,epo --points=7 --seeds=3
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.comparison.grouping import method_label
from balance.comparison.store import Store
from experiments.analysis.front_figure import fronts_figure
from experiments.analysis.fronts import Front, Indicators, Point, common_reference, indicators
from experiments.cli import add_methods, add_output, add_overrides, all_overrides, command_parser, parse_seeds, run_command
from experiments.config.layers import configure, values_by_key
from experiments.config.schema import RunConfig
from experiments.problems import base as problems
from experiments.sweeps.console import show_plan
from experiments.sweeps.execute import execute
from experiments.sweeps.fan import configurations
from experiments.sweeps.plan import Sweep, plan
from experiments.training.threads import runs_at_a_time

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.cli import Work
    from experiments.problems.base import Problem
    from experiments.sweeps.job import Job


class Fan(NamedTuple):
    """Planned runs of a fan.

    Attributes:
        jobs: The runs.
        shares: By fingerprint of a run, the methods and the share of the first task.
        metrics: Metrics of the two tasks.
        higher_is_better: Names of metrics of which higher is better; their costs are 1 minus the metric.
    """

    jobs: Sequence[Job]
    shares: Mapping[str, tuple[str, float]]
    metrics: tuple[str, str]
    higher_is_better: frozenset[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 with a front, 1 if a run failed, 2 for a mistake, 130 after Ctrl-C."""
    interrupted = "Interrupted. The same command resumes from here."
    return run_command(build_parser(), arguments, prepare_work, interrupted=interrupted)


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with methods, seeds, the two tasks, and the number of points."""
    parser = command_parser(__doc__)
    add_output(parser)
    add_methods(parser, several=True)
    parser.add_argument("--tasks", metavar="A,B", help="the two tasks (default: the first two of the problem)")
    parser.add_argument("--metrics", metavar="A,B", help="a metric of each (default: the first metric of each task)")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="preferences of each method (default: 5)")
    parser.add_argument("--seeds", default="1", metavar="N", help="number, such as 3 for 0, 1, 2, or list of seeds: 4,7")
    parser.add_argument("--reference", metavar="X,Y", help="reference point of the hypervolume (default: beyond all points)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores divided by train.threads)")
    parser.add_argument("--output", metavar="FOLDER", help="for the figure (default: <output_dir>/<experiment>/front)")
    add_overrides(parser, "for every run, any entry of the trainer's configuration, such as train.epochs=3")
    return parser


def prepare_work(options: argparse.Namespace) -> Work:
    """Plan the runs, and return the work: to run the plan and to draw the fronts.

    Returns:
        A function that does the work.

    Raises:
        ValueError: If an option is wrong.
        OSError: If the tracking store cannot be used.
    """
    values = values_by_key(all_overrides(argparse.Namespace(**vars(options) | {"loss_method": None, "gradient_method": None})))
    name = values.get("experiment", RunConfig.experiment)
    overrides = tuple(f"{key}={value}" for key, value in values.items())
    of_data = [f"experiment={name}", *(override for override in overrides if override.startswith("data."))]
    problem = problems.with_tasks(problems.find(name), configure(of_data).data)
    tasks = _pair(options.tasks or ",".join(problem.TASKS[:2]), "--tasks")
    losses, gradients = (words.split(",") for words in (options.loss_method or "ls", options.gradient_method or "none"))
    fan = dict(configurations(losses, gradients, options.points, tasks, problem.TASKS))
    metrics = _metrics(options.metrics, tasks, problem)
    jobs = plan(Sweep(tuple(fan), tuple(parse_seeds(options.seeds)), overrides, with_baselines=False), create=True)
    of_run = {job.fingerprint: (_label(job), share) for job in jobs for made, share in fan.items() if made.name == job.name}
    reference = None
    if options.reference is not None:
        x, y = _pair(options.reference, "--reference")
        reference = float(x), float(y)
    folder = Path(options.output or Path(jobs[0].config.output_dir) / name / "front").expanduser().resolve()
    workers = runs_at_a_time([job.config for job in jobs], options.jobs)
    return partial(run_and_draw, Fan(jobs, of_run, metrics, problem.HIGHER_IS_BETTER), workers, reference, folder)


def run_and_draw(fan: Fan, workers: int, reference: tuple[float, float] | None, folder: Path) -> int:
    """Run the jobs that are not finished, print the table of the fronts, and write figure and numbers; return the exit code."""
    console = Console(soft_wrap=True)
    show_plan(fan.jobs, workers, console)
    code = execute(fan.jobs, workers, "loky", console)
    fronts = read_fronts(fan)
    if not fronts:
        console.print("No run has finished, so that there is no front.")
        return 1
    reference = reference or common_reference(fronts)
    described = {front.label: indicators(front.costs, reference) for front in fronts}
    console.print(_table(described, reference))
    names = tuple(f"1 - {metric}" if metric in fan.higher_is_better else metric for metric in fan.metrics)
    for path in write(folder, fronts, described, (names[0], names[1]), reference):
        console.print(f"Written: {path}")
    return code


def read_fronts(fan: Fan) -> list[Front]:
    """Return the fronts of the finished runs, means over seeds."""
    config = fan.jobs[0].config
    costs: dict[tuple[str, float], dict[str, tuple[float, float]]] = {}
    for run in Store(config.experiment, config.output_dir).runs():
        if run.finished and run.fingerprint in fan.shares:
            x, y = (_cost(run.metrics, metric, fan.higher_is_better) for metric in fan.metrics)
            costs.setdefault(fan.shares[run.fingerprint], {})[run.fingerprint] = (x, y)
    by_label: dict[str, list[Point]] = {}
    for (label, share), runs in sorted(costs.items()):
        columns = list(zip(*runs.values(), strict=True))
        means, errors = [mean(column) for column in columns], [_error(column) for column in columns]
        by_label.setdefault(label, []).append(Point(share, (means[0], means[1]), (errors[0], errors[1])))
    return [Front(label, tuple(points)) for label, points in by_label.items()]


def write(
    folder: Path,
    fronts: Sequence[Front],
    described: Mapping[str, Indicators],
    names: tuple[str, str],
    reference: tuple[float, float],
) -> list[Path]:
    """Write the figure as PNG and PDF, and all numbers as JSON; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = fronts_figure(fronts, names, reference)
    paths = [folder / "front.png", folder / "front.pdf", folder / "front.json"]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1])
    content = {
        "costs": names,
        "reference": reference,
        "fronts": {
            front.label: {
                "points": [point._asdict() for point in front.points],
                "indicators": described[front.label]._asdict(),
            }
            for front in fronts
        },
    }
    paths[2].write_text(json.dumps(content, indent=1).replace("NaN", "null") + "\n", encoding="utf-8")
    return paths


def _label(job: Job) -> str:
    return method_label(job.config.loss_method, job.config.gradient_method)


def _table(described: Mapping[str, Indicators], reference: tuple[float, float]) -> Table:
    title = f"Reference point ({reference[0]:.4g}, {reference[1]:.4g})"
    table = Table("method", *(field.replace("_", " ") for field in Indicators._fields), title=title, title_style="")
    for label, numbers in described.items():
        table.add_row(label, *(f"{number:.4g}" for number in numbers))
    return table


def _pair(words: str, flag: str) -> tuple[str, str]:
    parts = [word.strip() for word in words.split(",")]
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{flag} must be two values, separated by a comma, but got '{words}'.")
    return parts[0], parts[1]


def _metrics(words: str | None, tasks: tuple[str, str], problem: Problem) -> tuple[str, str]:
    """Return a metric of each of two tasks."""
    known = list(problem.metrics())
    if words is not None:
        chosen = _pair(words, "--metrics")
        for metric in chosen:
            if metric not in known:
                raise ValueError(f"--metrics must be two of {', '.join(known)}, but got '{metric}'.")
        return chosen
    first = [next((metric for metric in known if metric.startswith(f"{task}/")), None) for task in tasks]
    if first[0] is None or first[1] is None:
        raise ValueError(f"The tasks {tasks} lack a metric. Choose two with --metrics from {', '.join(known)}.")
    return first[0], first[1]


def _cost(metrics: Mapping[str, float], name: str, higher_is_better: frozenset[str]) -> float:
    value = metrics.get(name, math.nan)
    return 1 - value if name in higher_is_better else value


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


if __name__ == "__main__":
    sys.exit(main())
