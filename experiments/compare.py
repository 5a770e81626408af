"""Compare the recorded runs of an experiment: a table, figures for a paper, and one page with both.

python experiments/compare.py --experiment=digits --format=markdown train.epochs=5
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.comparison.comparison import table_of_runs
from balance.comparison.declared import declared_baselines, directions
from balance.comparison.report_files import write_figure_per_setting, write_report
from balance.comparison.run_table import tabulate
from balance.comparison.selection import select_runs, split_runs
from balance.comparison.store import Store
from balance.comparison.tables import Format
from balance.messages import unknown
from balance.tracking import recorded_experiments, tracking_uri, without_password
from experiments.analysis import baselines, published_comparison, published_tables
from experiments.analysis.printing import print_tables, print_tables_per
from experiments.analysis.published_comparison import compare_with_published
from experiments.analysis.selection import as_recorded, reason_for_no_runs
from experiments.cli import add_output, add_overrides, command_parser, mistakes_refused, run_command
from experiments.config.layers import values_by_key
from experiments.problems import base as problems

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from balance.comparison.recorded_run import RecordedRun
    from balance.comparison.run_table import RunTable
    from balance.comparison.single_task import Baselines
    from experiments.analysis.published_comparison import PublishedComparison
    from experiments.cli import Work


class Result(NamedTuple):
    """Compared runs.

    Attributes:
        store: Store of the runs.
        runs: The runs.
        comparisons: Their comparison by value of the setting ``--per``; one comparison, with an empty key, without it.
        published: Their relation to published tables.
    """

    store: Store
    runs: Sequence[RecordedRun]
    comparisons: Mapping[str, RunTable]
    published: Sequence[PublishedComparison]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 with a table, 2 for a mistake or without runs to compare, 130 after Ctrl-C."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = f"python experiments/compare.py {shlex.join(words)}"
    return run_command(parser, words, partial(prepare_work, parser=parser, command=command))


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with flags for runs, baselines, published results, and the form of the output."""
    parser = command_parser(__doc__)
    add_output(parser)
    parser.add_argument(
        "--runs", nargs="+", metavar="ID", help="MLflow ids of the runs, or of sweeps (default: all that have ended)"
    )
    parser.add_argument(
        "--format", choices=get_args(Format), default="table", help="format of the printed table (default: table)"
    )
    parser.add_argument(
        "--baselines",
        metavar="FILE",
        help="file of single-task metrics, written by baselines.py, or none (default: recorded single-task runs)",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help=f"also print the results of papers, available for {', '.join(published_tables.experiments())}",
    )
    parser.add_argument(
        "--per", metavar="KEY", help="one table for each value of this setting, such as data.imbalance, and one figure of all"
    )
    parser.add_argument(
        "--pareto", metavar="METRIC,METRIC", help="axes of the Pareto plot (default: metrics on which methods disagree most)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="for report and figures (default: <output_dir>/<experiment>/comparison)"
    )
    parser.add_argument("--table_only", action="store_true", help="no report, no figures")
    add_overrides(parser, "only runs with this setting, such as train.epochs=3")
    return parser


def prepare_work(options: argparse.Namespace, *, parser: argparse.ArgumentParser, command: str) -> Work:
    """Compare the runs, and return the remaining work: to print and to write.

    Returns:
        A function that prints and writes the results.

    Raises:
        ValueError: If an option is unknown, or no run is left to compare.
        OSError: If the tracking store cannot be read.
    """
    filters = _filters(options)
    output_dir = options.output_dir or filters.pop("output_dir", "runs")
    name = options.experiment or filters.pop("experiment", "digits")
    if options.published and options.per is not None:
        raise ValueError("--published must not be combined with --per. Give one of the two.")
    tables = published_tables.for_experiment(name) if options.published else ()
    if tables and not options.runs and (reason := reason_for_no_runs(name, output_dir)):
        published = [compare_with_published(table, None) for table in tables]
        return partial(show_published, name, published, options.format, reason)
    check_experiment(name, output_dir)
    store = Store(name, output_dir)
    recorded = store.runs()
    runs = select_runs(store, recorded, options.runs, filters)
    comparisons = compare_per(name, runs, recorded, options)
    first = next(iter(comparisons.values()))
    options.pareto = _pareto_axes(options.pareto, first)
    options.output = Path(options.output or Path(output_dir) / name / "comparison").expanduser().resolve()
    result = Result(store, runs, comparisons, [compare_with_published(table, first) for table in tables])
    return partial(show, result, options, parser=parser, command=command)


def check_experiment(name: str, output_dir: str) -> None:
    """Check that an experiment is a problem here, or that a training loop of a user has recorded runs of it.

    Raises:
        ValueError: If it is neither, or the problem is incomplete.
        OSError: If the server does not answer.
    """
    if name in problems.names():
        problems.find(name)
        return
    recorded = recorded_experiments(output_dir)
    if name not in recorded:
        place = without_password(tracking_uri(output_dir))
        message = unknown("experiment", name, {*problems.names(), *recorded})
        raise ValueError(f"{message} Recorded in {place}: {', '.join(recorded) or 'none'}.")


def compare_per(
    name: str, runs: Sequence[RecordedRun], recorded: Sequence[RecordedRun], options: argparse.Namespace
) -> dict[str, RunTable]:
    """Return the comparison of the runs for each value of the setting ``--per``, or one with an empty key without it.

    Raises:
        ValueError: If no run has the setting, no baselines exist, or the runs cannot be compared.
    """
    if options.per is None:
        return {"": compare(name, runs, recorded, options.baselines)}
    return {
        value: compare(name, group, recorded, options.baselines, title=f"{options.per}={value}")
        for value, group in split_runs(runs, options.per, recorded).items()
    }


def compare(
    name: str,
    runs: Sequence[RecordedRun],
    recorded: Sequence[RecordedRun],
    baselines_file: str | None,
    *,
    title: str = "",
) -> RunTable:
    """Return the table of the runs.

    Args:
        name: Name of the experiment.
        runs: Runs to compare.
        recorded: All recorded runs.
        baselines_file: File of single-task metrics, ``"none"`` for a table without delta_m, or None for recorded baselines, if
            the experiment has any.
        title: Text above the table.

    Raises:
        ValueError: If no baselines exist, or the runs cannot be compared.
    """
    given = read_baselines(baselines_file)
    if name not in problems.names():
        return table_of_runs(name, runs, recorded, baselines=given, title=title)
    problem = problems.find(name)
    known = None if given == "none" else given or declared_baselines(runs)
    if given is None and known is None and problem.SINGLE_TASK_BASELINES:
        known = baselines.for_table(name, runs, recorded)
    return tabulate(
        runs,
        experiment=name,
        higher_is_better=directions(runs, problem.HIGHER_IS_BETTER),
        baselines=None if known is None else known.metrics,
        baselines_from="" if known is None else known.origin,
        title=title,
    )


def read_baselines(file: str | None) -> Baselines | Literal["none"] | None:
    """Return the baselines in a file; ``"none"`` and None are not names of files."""
    if file == "none":
        return "none"
    return None if file is None else baselines.read_file(Path(file)).baselines


def show_published(name: str, published: Sequence[PublishedComparison], form: Format, reason: str) -> int:
    """Print published results, and the reason why no runs are compared; return the exit code."""
    print_tables(name, None, published, form)
    Console(stderr=True, soft_wrap=True).print(f"{reason} No report is written.", markup=False)
    return 0


def show(result: Result, options: argparse.Namespace, *, parser: argparse.ArgumentParser, command: str) -> int:
    """Print the tables and, without ``--table_only``, write the report; return the exit code."""
    if options.per is None:
        compared = result.comparisons[""]
        print_tables(compared.experiment, compared, result.published, options.format)
    else:
        print_tables_per(options.per, result.comparisons, options.format)
    if options.table_only:
        return 0
    with mistakes_refused(parser):
        files = write_files(result, options, command)
    status = Console(stderr=True, soft_wrap=True)
    status.print(f"Report: {files[0]}", markup=False)
    sweep = result.store.sweep_of(result.runs) if options.runs else result.store.sweep()
    if sweep is not None:
        for file in files:  # and no other files that the folder may contain
            place = Path("comparison") / file.parent.relative_to(options.output)
            result.store.client.log_artifact(sweep.info.run_id, str(file), place.as_posix())
        status.print(f"and among the artifacts of the MLflow run '{sweep.info.run_name}', in comparison/", markup=False)
    return 0


def write_files(result: Result, options: argparse.Namespace, command: str) -> list[Path]:
    """Write a page with figures for each comparison, and a figure of all if there are several; return the files.

    Returns:
        Paths of the files.

    Raises:
        OSError: If the folder cannot be written.
    """
    files, sections = [], [published_comparison.section(published) for published in result.published]
    for value, compared in result.comparisons.items():
        folder = options.output if options.per is None else options.output / f"{options.per}={value.replace('/', '_')}"
        files += write_report(compared, sections, result.store, folder, axes=options.pareto, command=command)
    if options.per is not None:
        files += write_figure_per_setting(options.per, result.comparisons, result.store, options.output)
    return files


def _filters(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings that runs must have.

    A word such as ``train.epochs=3`` after ``--runs`` is a setting, too, and is removed from the ids.
    """
    words = [*options.overrides, *(word for word in options.runs or () if "=" in word)]
    options.runs = [word for word in options.runs or () if "=" not in word]
    return {key: as_recorded(value) for key, value in values_by_key(words).items()}


def _pareto_axes(words: str | None, compared: RunTable) -> tuple[str, str] | None:
    names = words.split(",") if words is not None else []
    for name in names:
        if name not in compared.metrics:
            raise ValueError(unknown("metric in --pareto", name, compared.metrics))
    if words is not None and len(names) != 2:
        raise ValueError(f"--pareto must be two metrics separated by a comma, but got '{words}'.")
    return (names[0], names[1]) if names else None


if __name__ == "__main__":
    sys.exit(main())
