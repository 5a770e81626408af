"""Compare the recorded runs of an experiment: a table, figures for a paper, and one page with both.

python experiments/compare.py --experiment=digits --format=markdown train.epochs=5
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.messages import unknown
from experiments.analysis import baselines, comparison, published_tables, report
from experiments.analysis.figures import gallery
from experiments.analysis.printing import print_tables
from experiments.analysis.published_comparison import compare_with_published
from experiments.analysis.tables import Format
from experiments.cli import add_output, add_overrides, as_recorded, command_parser, mistakes_refused, run_command
from experiments.config.layers import values_by_key
from experiments.problems import base as experiments
from experiments.recording.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.analysis.comparison import Comparison
    from experiments.analysis.published_comparison import PublishedComparison
    from experiments.cli import Work
    from experiments.recording.recorded_run import RecordedRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 with a table, 2 for a mistake in the command or nothing to compare."""
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

    Raises:
        ValueError: If an option is unknown, or no run is left to compare.
        OSError: If the tracking store cannot be read.
    """
    filters = _filters(options)
    output_dir = options.output_dir or filters.pop("output_dir", "runs")
    name = options.experiment or filters.pop("experiment", "digits")
    tables = published_tables.for_experiment(name) if options.published else ()
    if tables and not options.runs and (missing := reason_for_no_runs(name, output_dir)):
        published = [compare_with_published(table, None) for table in tables]
        return partial(show_published, name, published, options.format, missing)
    experiments.find(name)
    store = Store(name, output_dir)
    runs, recorded = select_runs(store, options.runs, filters)
    compared = compare(name, runs, recorded, options.baselines)
    options.pareto = _pareto_axes(options.pareto, compared)
    options.output = Path(options.output or Path(output_dir) / name / "comparison").expanduser().resolve()
    result = Result(store, runs, compared, [compare_with_published(table, compared) for table in tables])
    return partial(show, result, options, parser=parser, command=command)


class Result(NamedTuple):
    """Runs and their comparison, with each other and with published tables."""

    store: Store
    runs: Sequence[RecordedRun]
    comparison: Comparison
    published: Sequence[PublishedComparison]


def show_published(name: str, published: Sequence[PublishedComparison], form: Format, reason: str) -> int:
    """Print published results, and the reason why no runs are compared; return the exit code."""
    print_tables(name, None, published, form)
    Console(stderr=True, soft_wrap=True).print(f"{reason} No report is written.", markup=False)
    return 0


def show(result: Result, options: argparse.Namespace, *, parser: argparse.ArgumentParser, command: str) -> int:
    """Print the table and, unless only the table is wanted, write the report; return the exit code."""
    print_tables(result.comparison.experiment, result.comparison, result.published, options.format)
    if options.table_only:
        return 0
    with mistakes_refused(parser):
        files = write_report(result, options.pareto, options.output, command)
    status = Console(stderr=True, soft_wrap=True)
    status.print(f"Report: {files[0]}", markup=False)
    sweep = result.store.sweep_of(result.runs) if options.runs else result.store.sweep()
    if sweep is not None:
        for file in files:  # and no other files that the folder may contain
            result.store.client.log_artifact(sweep.info.run_id, str(file), "comparison")
        status.print(f"and among the artifacts of the MLflow run '{sweep.info.run_name}', in comparison/", markup=False)
    return 0


def reason_for_no_runs(name: str, output_dir: str) -> str:
    """Return the reason why no recorded run can be compared; empty if some can.

    Raises:
        OSError: If the server does not answer.
    """
    if name not in experiments.names():
        return f"No recorded runs of '{name}': it is not among the experiments ({', '.join(experiments.names())})."
    try:
        store = Store(name, output_dir)
    except FileNotFoundError as error:
        return str(error)
    if any(run.finished and not run.is_single_task for run in store.runs()):
        return ""
    return f"No finished runs of '{name}' in {store.place}."


def select_runs(
    store: Store, run_ids: Sequence[str] | None, filters: Mapping[str, str]
) -> tuple[list[RecordedRun], list[RecordedRun]]:
    """Return the runs to compare, without single-task networks, and all recorded runs.

    Raises:
        ValueError: If an id or a setting is unknown, or no finished run is left.
    """
    recorded = store.runs()
    runs = [run for run in (store.chosen(run_ids) if run_ids else recorded) if not run.is_single_task]
    for key, value in filters.items():
        runs = [run for run in runs if _setting(run, key, recorded) == as_recorded(value)]
    if not any(run.finished for run in runs):
        condition = f" with {', '.join(f'{key}={value}' for key, value in filters.items())}" if filters else ""
        raise ValueError(f"No finished runs of '{store.experiment}'{condition} in {store.place}. Use sweep.py to train some.")
    return runs, recorded


def compare(name: str, runs: Sequence[RecordedRun], recorded: Sequence[RecordedRun], baselines_file: str | None) -> Comparison:
    """Return the table of the runs.

    Args:
        name: Name of the experiment.
        runs: Runs to compare.
        recorded: All recorded runs.
        baselines_file: File of single-task metrics, ``"none"`` for a table without delta_m, or None for recorded baselines.

    Raises:
        ValueError: If no baselines exist, or the runs cannot be compared.
    """
    if baselines_file == "none":
        known = None
    elif baselines_file is not None:
        known = baselines.read_file(Path(baselines_file)).baselines
    else:
        known = baselines.for_table(name, runs, recorded)
    return comparison.compare(
        runs,
        experiment=name,
        higher_is_better=experiments.find(name).HIGHER_IS_BETTER,
        baselines=None if known is None else known.metrics,
        baselines_from="" if known is None else known.origin,
    )


def write_report(result: Result, axes: tuple[str, str] | None, folder: Path, command: str) -> list[Path]:
    """Write the page and the figures.

    Args:
        result: Content of the page.
        axes: Metrics of the Pareto plot; None for a default.
        folder: Folder for the files.
        command: Command that made the page.

    Returns:
        The files, the page first.

    Raises:
        OSError: If the folder cannot be written.
    """
    compared = result.comparison
    curves = {row.label: result.store.curves(run.run_id for run in row.runs) for row in compared.rows}
    figures = gallery.every_figure(compared, curves, axes)
    page = folder / "report.html"
    title = f"Comparison of methods on {compared.experiment}"
    try:
        files = gallery.save(figures, folder)
        page.write_text(report.html(compared, figures, result.published, title=title, command=command), encoding="utf-8")
    except OSError as error:
        raise OSError(f"--output: cannot write to {folder} ({error.strerror}). Choose another folder.") from None
    return [page, *files]


def _filters(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings that runs must have.

    A word such as ``train.epochs=3`` after ``--runs`` is a setting, too, and is removed from the ids.
    """
    words = [*options.overrides, *(word for word in options.runs or () if "=" in word)]
    options.runs = [word for word in options.runs or () if "=" not in word]
    return values_by_key(words)


def _setting(run: RecordedRun, key: str, recorded: Sequence[RecordedRun]) -> str | None:
    special = {"loss_method": run.loss_method, "gradient_method": str(run.gradient_method), "seed": str(run.seed)}
    if key not in special and not any(key in other.settings for other in recorded):
        raise ValueError(unknown("setting", key, {*special, *(key for other in recorded for key in other.settings)}))
    return special.get(key, run.settings.get(key))


def _pareto_axes(words: str | None, compared: Comparison) -> tuple[str, str] | None:
    names = words.split(",") if words is not None else []
    for name in names:
        if name not in compared.metrics:
            raise ValueError(unknown("metric in --pareto", name, compared.metrics))
    if words is not None and len(names) != 2:
        raise ValueError(f"--pareto must be two metrics separated by a comma, but got '{words}'.")
    return (names[0], names[1]) if names else None


if __name__ == "__main__":
    sys.exit(main())
