"""Tables on standard output: of recorded runs, and of published results."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from balance.comparison import formats
from balance.comparison.tables import (
    COLUMNS,
    csv_lines,
    csv_text,
    fitting,
    for_terminal,
    json_content,
    json_text,
    render,
)
from experiments.analysis import published_comparison, published_export

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from balance.comparison.formats import TextTable
    from balance.comparison.run_table import RunTable
    from balance.comparison.tables import Format
    from experiments.analysis.published_comparison import PublishedComparison


def print_tables(name: str, compared: RunTable | None, tables: Sequence[PublishedComparison], form: Format) -> None:
    """Print the table of the runs and the published tables, with their notes except in formats for programs.

    Args:
        name: Name of the experiment.
        compared: Recorded runs, if any.
        tables: Published tables.
        form: Format of all tables.
    """
    if tables and form == "json":
        print(published_export.as_json(name, compared, tables))
    elif tables and form == "csv":
        print(published_export.as_csv(compared, tables))
    else:
        if compared is not None:
            print_comparison(compared, form)
        for k, published in enumerate(tables):
            if form != "latex" and (compared is not None or k > 0):
                print()
            _print_published(published, form)


def print_tables_per(key: str, comparisons: Mapping[str, RunTable], form: Format) -> None:
    """Print one table for each value of a setting.

    Args:
        key: The setting.
        comparisons: RunTable of the runs with each value of the setting.
        form: Format of all tables; CSV has a further column for the setting, JSON an object with the values as keys.
    """
    if form == "csv":
        lines = [{key: value, **line} for value, compared in comparisons.items() for line in csv_lines(compared)]
        print(csv_text(lines, (key, *COLUMNS)))
    elif form == "json":
        print(json_text({"per": key, "comparisons": {value: json_content(made) for value, made in comparisons.items()}}))
    else:
        for k, compared in enumerate(comparisons.values()):
            if k > 0:
                print()
            print_comparison(compared, form)


def print_comparison(compared: RunTable, form: Format) -> None:
    """Print the table of the runs, with its notes except in formats for programs."""
    if form == "table":
        _print_fitting(partial(for_terminal, compared))
    else:
        print(render(compared, form))
    if form in ("table", "markdown"):
        _print_notes(compared.notes)


def _print_published(published: PublishedComparison, form: Format) -> None:
    if form == "latex":
        print(formats.latex(published_comparison.table_for_latex(published)))
        return
    if published.relation:
        print(published.relation, end="\n\n" if form == "markdown" else "\n")
    if form == "table":
        _print_fitting(partial(published_comparison.text_table, published))
    else:
        print(formats.markdown(published_comparison.text_table(published)))
    _print_notes(published_comparison.notes(published))


def _print_fitting(make: Callable[[int], TextTable]) -> None:
    """Print a table with as many metrics as fit the terminal; a file gets as many as the widest terminal.

    Args:
        make: Returns the table with at most so many metrics.
    """
    console = Console()
    table, width = fitting(make, console)
    (console if console.is_terminal else Console(width=width)).print(table)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"- {note}")
