"""Compare the recorded runs of an experiment: a table, the figures of a paper, and one page that holds both.

python experiments/compare.py --experiment=digits --format=markdown train.epochs=5
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.measure import Measurement

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.messages import unknown
from experiments.analysis import baselines as reference
from experiments.analysis import comparison, report
from experiments.analysis import formats as sheet
from experiments.analysis import published as papers
from experiments.analysis import published_tables as published
from experiments.analysis.figures import figures
from experiments.analysis.tables import METRICS_IN_TERMINAL, Format, for_terminal, render
from experiments.cli import add_output, add_overrides, as_recorded, command_parser
from experiments.config.layers import values_by_key
from experiments.problems import base as experiments
from experiments.recording.store import Store, curves_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from experiments.analysis.comparison import Comparison, Run
    from experiments.analysis.published import Beside


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 with a table, 2 if there is nothing to compare."""
    parser = build_parser()
    options = parser.parse_intermixed_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        filters = _filters(options)
        output_dir = options.output_dir or filters.pop("output_dir", "runs")
        name = options.experiment or filters.pop("experiment", "digits")
        tables = published.of(name) if options.published else ()
        if tables and not options.runs and (missing := without_runs(name, output_dir)):
            show(name, None, [papers.beside(table, None) for table in tables], options.format)
            Console(stderr=True, soft_wrap=True).print(f"{missing} So there is no report.", markup=False)
            return 0
        experiments.find(name)
        store = Store(name, output_dir)
        runs, every = choose(store, options.runs, filters)
        compared = compare(name, runs, every, options.baselines)
        axes = _pareto_axes(options.pareto, compared)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    known = [papers.beside(table, compared) for table in tables]
    show(name, compared, known, options.format)
    if options.table_only:
        return 0
    folder = Path(options.output or Path(output_dir) / name / "comparison").expanduser().resolve()
    command = f"python experiments/compare.py {shlex.join(words)}"
    try:
        files = write(compared, known, curves_of(store, compared), axes, folder, command)
    except OSError as error:
        parser.error(f"--output: cannot write to {folder} ({error.strerror}).")
    status = Console(stderr=True, soft_wrap=True)
    status.print(f"Report: {files[0]}", markup=False)
    sweep = store.sweep_of(runs) if options.runs else store.sweep()
    if sweep is not None:
        for file in files:  # and nothing else that may lie in the folder
            store.client.log_artifact(sweep.info.run_id, str(file), "comparison")
        status.print(f"and among the artifacts of the MLflow run '{sweep.info.run_name}', in comparison/", markup=False)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """What to compare, with what, and in which form."""
    parser = command_parser(__doc__)
    add_output(parser)
    parser.add_argument(
        "--runs", nargs="+", metavar="ID", help="MLflow ids of the runs, or of sweeps (default: all that have ended)"
    )
    parser.add_argument(
        "--format", choices=get_args(Format), default="table", help="of the table that is printed (default: table)"
    )
    parser.add_argument(
        "--baselines",
        metavar="FILE",
        help="single-task numbers as baselines.py writes them, or none (default: those that were recorded)",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help=f"also what papers print: {', '.join(published.experiments())}",
    )
    parser.add_argument(
        "--pareto", metavar="METRIC,METRIC", help="axes of the Pareto plot (default: those that the methods disagree on most)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="for report and figures (default: <output_dir>/<experiment>/comparison)"
    )
    parser.add_argument("--table_only", action="store_true", help="no report, no figures")
    add_overrides(parser, "only runs with this setting, such as train.epochs=3")
    return parser


def without_runs(name: str, output_dir: str) -> str:
    """Why there is nothing that was recorded and could be compared; empty if there is something.

    Raises:
        OSError: If the server does not answer.
    """
    if name not in experiments.names():
        return f"There are no runs of '{name}': it is not among the experiments ({', '.join(experiments.names())})."
    try:
        store = Store(name, output_dir)
    except FileNotFoundError as error:
        return str(error)
    if any(run.finished and not comparison.is_single_task(run) for run in store.runs()):
        return ""
    return f"There are no finished runs of '{name}' in {store.place}."


def choose(store: Store, run_ids: Sequence[str] | None, filters: Mapping[str, str]) -> tuple[list[Run], list[Run]]:
    """The runs to compare, without single-task networks, and all runs.

    Raises:
        ValueError: If an id or a setting is unknown, or nothing is left.
    """
    every = store.runs()
    runs = [run for run in (store.chosen(run_ids) if run_ids else every) if not comparison.is_single_task(run)]
    for key, value in filters.items():
        runs = [run for run in runs if _setting(run, key, every) == as_recorded(value)]
    if not any(run.finished for run in runs):
        having = f" with {', '.join(f'{key}={value}' for key, value in filters.items())}" if filters else ""
        raise ValueError(f"There are no finished runs of '{store.experiment}'{having} in {store.place}. sweep.py makes some.")
    return runs, every


def compare(name: str, runs: Sequence[Run], every: Sequence[Run], baselines: str | None) -> Comparison:
    """The table of the runs.

    Raises:
        ValueError: If there are no baselines, or the runs cannot be compared.
    """
    if baselines == "none":
        found = None
    elif baselines is not None:
        found = reference.read_file(Path(baselines))[0]
    else:
        found = reference.for_table(name, runs, every)
    return comparison.compare(
        runs,
        experiment=name,
        higher_is_better=experiments.find(name).HIGHER_IS_BETTER,
        baselines=None if found is None else found.metrics,
        baselines_from="" if found is None else found.origin,
    )


def show(name: str, compared: Comparison | None, tables: Sequence[Beside], form: Format) -> None:
    """Print the runs and the published tables; what a reader must know goes below, but not into formats for machines."""
    if tables and form == "json":
        print(papers.in_one_json(name, compared, tables))
        return
    if tables and form == "csv":
        print(papers.in_one_csv(compared, tables))
        return
    if compared is not None:
        if form == "table":
            _print_fitting(partial(for_terminal, compared))
        else:
            print(render(compared, form))
        if form in ("table", "markdown"):
            _print_notes(compared.notes)
    for k, of in enumerate(tables):
        if form == "latex":
            print(sheet.latex(papers.for_latex(of)))
            continue
        if compared is not None or k > 0:
            print()
        if of.relation:
            print(of.relation, end="\n\n" if form == "markdown" else "\n")
        if form == "table":
            _print_fitting(partial(papers.sheet, of))
        else:
            print(sheet.markdown(papers.sheet(of)))
        _print_notes(papers.notes(of))


def _print_fitting(make: Callable[[int], sheet.Sheet]) -> None:
    """Print a table with as many metrics as the terminal has room for; a file has room for all that are ever shown."""
    console = Console()
    wide = console.options.update(max_width=1000)
    for most_metrics in range(METRICS_IN_TERMINAL, -1, -1):
        made = sheet.terminal(make(most_metrics))
        width = Measurement.get(console, wide, made).maximum
        if width <= console.width or not console.is_terminal:
            break
    (console if console.is_terminal else Console(width=max(console.width, width))).print(made)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"- {note}")


def write(
    compared: Comparison,
    tables: Sequence[Beside],
    curves: figures.Curves,
    axes: tuple[str, str] | None,
    folder: Path,
    command: str,
) -> list[Path]:
    """Write the page and the figures.

    Returns:
        The files, the page first.
    """
    drawn = figures.every_figure(compared, curves, axes)
    files = figures.save(drawn, folder)
    page = folder / "report.html"
    title = f"Comparison of methods on {compared.experiment}"
    page.write_text(report.html(compared, drawn, tables, title=title, command=command), encoding="utf-8")
    return [page, *files]


def _filters(options: argparse.Namespace) -> dict[str, str]:
    """Settings that runs must have; words such as ``train.epochs=3`` may have landed among the ids."""
    words = [*options.overrides, *(word for word in options.runs or () if "=" in word)]
    options.runs = [word for word in options.runs or () if "=" not in word]
    return values_by_key(words)


def _setting(run: Run, key: str, every: Sequence[Run]) -> str | None:
    known = {"loss_method": run.loss_method, "gradient_method": str(run.gradient_method), "seed": str(run.seed)}
    if key not in known and not any(key in other.settings for other in every):
        raise ValueError(unknown("setting", key, {*known, *(key for other in every for key in other.settings)}))
    return known.get(key, run.settings.get(key))


def _pareto_axes(words: str | None, compared: Comparison) -> tuple[str, str] | None:
    names = words.split(",") if words is not None else []
    for name in names:
        if name not in compared.metrics:
            raise ValueError(unknown("metric in --pareto", name, compared.metrics))
    if words is not None and len(names) != 2:
        raise ValueError(f"--pareto needs two metrics separated by a comma, but got '{words}'.")
    return (names[0], names[1]) if names else None


if __name__ == "__main__":
    sys.exit(main())
