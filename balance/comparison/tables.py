"""A comparison as a table: rounded for the terminal, Markdown and LaTeX, and with all digits for CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from rich.console import Console
from rich.measure import Measurement

from .formats import BOLD, MISSING, Cell, TextTable, latex, markdown, terminal, without_bold
from .run_table import main_summary

if TYPE_CHECKING:
    from rich.table import Table

    from .run_table import Row, RunTable
    from .statistics import Estimate

Format = Literal["table", "markdown", "latex", "csv", "json"]

SINGLE_TASK = "single-task networks"
METRICS_IN_TERMINAL = 6  # more columns would leave each a letter wide
STATISTICS = ("mean", "standard_error", "low", "high", "verdict", "seeds", "values", "run_ids")
COLUMNS = ("method", "loss_method", "gradient_method", "quantity", *STATISTICS)  # of CSV


@overload
def render(run_table: RunTable, form: Literal["table"]) -> Table: ...
@overload
def render(run_table: RunTable, form: Literal["markdown", "latex", "csv", "json"]) -> str: ...
def render(run_table: RunTable, form: Format) -> Table | str:
    """Return the comparison in one of the formats.

    ``csv`` and ``json`` have all digits. The other formats are rounded and have a legend.
    """
    forms: dict[str, Callable[[RunTable], Table | str]] = {
        "table": lambda whole: terminal(for_terminal(whole)),
        "markdown": lambda whole: markdown(text_table(whole)),
        "latex": lambda whole: latex(text_table(whole)),
        "csv": lambda whole: csv_text(csv_lines(whole)),
        "json": lambda whole: json_text(json_content(whole)),
    }
    return forms[form](run_table)


def text_table(run_table: RunTable) -> TextTable:
    """Return the table before it is written in one of the forms."""
    header, lines = cells(run_table)
    return TextTable(header, lines, len(run_table.rows), legend(run_table), run_table.title)


def for_terminal(run_table: RunTable, most_metrics: int = METRICS_IN_TERMINAL) -> TextTable:
    """Return the table with at most so many metrics."""
    shown = replace(run_table, metrics=run_table.metrics[:most_metrics])
    table, hidden = text_table(shown), len(run_table.metrics) - len(shown.metrics)
    return table._replace(legend=table.legend + remark_on_hidden(hidden))


def fitting(make: Callable[[int], TextTable], console: Console) -> tuple[Table, int]:
    """Return a table with as many metrics as fit a terminal, and its width; for a file as many as the widest terminal gets.

    Args:
        make: Returns the table with at most so many metrics.
        console: The terminal or file.
    """
    wide = console.options.update(max_width=1000)
    for most_metrics in range(METRICS_IN_TERMINAL, -1, -1):
        table = terminal(make(most_metrics))
        width = Measurement.get(console, wide, table).maximum
        if width <= console.width or not console.is_terminal:
            break
    return table, max(console.width, width)


def plain_text(run_table: RunTable) -> str:
    """Return the table and its notes without colours and bold letters, as wide as the terminal if standard output is one."""
    table, width = fitting(lambda most_metrics: without_bold(for_terminal(run_table, most_metrics)), Console())
    page = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with page.capture() as written:
        page.print(table)
    lines = "\n".join(line.rstrip() for line in written.get().splitlines()).strip("\n").splitlines()
    notes = [textwrap.fill(f"- {note}", width, subsequent_indent="  ") for note in run_table.notes]
    return "\n".join([*lines, *notes])


def remark_on_hidden(metrics: int) -> str:
    """Return a sentence about the number of metrics that the terminal has no room for; empty for none."""
    return f" {metrics} further metrics are in the other formats." if metrics else ""


def cells(run_table: RunTable) -> tuple[list[str], list[list[Cell]]]:
    """Return header and lines; with baselines, the last line is for the single-task networks.

    Columns without any content are left out.
    """
    rows = run_table.rows
    columns: dict[str, list[Cell]] = {
        "method": [*(Cell(row.label) for row in rows), Cell(SINGLE_TASK)],
        "seeds": [*(Cell(_seeds(row)) for row in rows), Cell("")],
    }
    if any(row.delta_m for row in rows):
        drops = [row.delta_m for row in rows]
        columns["delta_m % ↓"] = _estimates(drops, 0.0)
        columns["95 % interval"] = [*_intervals(drops), Cell("")]
    columns["mean rank ↓"] = _numbers([row.mean_rank for row in rows], decimals=2)
    for name in run_table.metrics:
        baseline = (run_table.baselines or {}).get(name, math.nan)
        header = f"{name} {direction(name, run_table.higher_is_better)}"
        estimates = [row.metrics.get(name) for row in rows]
        columns[header] = _estimates(estimates, baseline)
        if name == main_summary(run_table.metrics):
            columns["interval"] = [*_intervals(estimates), Cell("")]
    columns["time / ls"] = _numbers([row.time for row in rows], decimals=2)
    columns["memory MiB"] = _numbers([row.memory for row in rows])
    columns = {name: column for name, column in columns.items() if any(cell.text != MISSING for cell in column[: len(rows)])}
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    names = ["95 % interval" if name == "interval" else name for name in columns]
    return names, lines if run_table.baselines else lines[:-1]


def direction(metric: str, higher_is_better: frozenset[str]) -> str:
    """Return an arrow up if the metric should be large, else an arrow down."""
    return "↑" if metric in higher_is_better else "↓"


def legend(run_table: RunTable) -> str:
    """Explain the signs and columns of the table."""
    header, lines = cells(run_table)
    sentences = [_legend_of_signs({cell.verdict for line in lines for cell in line})]
    if "delta_m % ↓" in header:
        source = f" ({run_table.baselines_from})" if run_table.baselines_from else ""
        sentences.append(f"delta_m: mean relative drop against single-task networks{source}; below 0 beats them.")
    if "mean rank ↓" in header:
        sentences.append(f"Mean rank: among these {len(run_table.rows)} methods only.")
    if "time / ls" in header:
        sentences.append("time / ls: duration of a training step relative to ls.")
    if "memory MiB" in header:
        sentences.append("memory: needs of a step in addition to parameters and the optimizer's state.")
    return " ".join(sentences)


def _legend_of_signs(verdicts: set[Any]) -> str:
    signs = ["mean ± standard error over seeds"]
    signs += [f"{BOLD}: best mean"] if "best" in verdicts else []
    signs += ["≈: not distinguishable from the best"] if "alike" in verdicts else []
    signs += ["?: too few seeds to distinguish it from the best"] if "unclear" in verdicts else []
    return "; ".join(signs).capitalize() + "."


def number_format(
    numbers: Iterable[float], errors: Iterable[float] = (), decimals: int | None = None
) -> Callable[[float], str]:
    """Return a function that writes the numbers of one column, all with equally many digits after the point.

    Args:
        numbers: Numbers of the column.
        errors: Their standard errors. The median error gets two digits if it starts with 1 or 2, else one. A further digit
            follows if the smallest error would become zero. Without errors, the largest number gets three digits.
        decimals: Digits after the point, if they are fixed.

    Returns:
        A function from a number to its text; NaN and infinity stay words.
    """
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    if decimals is None:
        decimals = _decimals([error for error in errors if math.isfinite(error) and error > 0], largest)
    notation = "e" if decimals > 6 or largest >= 1e7 else "f"
    digits = 2 if notation == "e" else max(decimals, 0)
    return lambda number: f"{round(number, digits) + 0.0 if notation == 'f' else number:.{digits}{notation}}"  # no "-0.0"


def _decimals(errors: Sequence[float], largest: float) -> int:
    """Return the digits after the point for positive errors, or for the largest number without errors."""
    size = statistics.median(errors) if errors else largest
    exponent = math.floor(math.log10(size)) if size > 0 else 0
    decimals = (int(size < 3 * 10.0**exponent) if errors else 2) - exponent
    return decimals + (bool(errors) and round(min(errors), decimals) == 0)


def _seeds(row: Row) -> str:
    return f"{len(row.runs)}, {row.failed} failed" if row.failed else f"{len(row.runs)}"


def _estimates(estimates: Sequence[Estimate | None], baseline: float) -> list[Cell]:
    """Return a column of means with standard errors, the baseline last."""
    write = _format_for(estimates)
    return [*(_estimate(estimate, write) for estimate in estimates), Cell(MISSING if math.isnan(baseline) else write(baseline))]


def _format_for(estimates: Sequence[Estimate | None]) -> Callable[[float], str]:
    finite = [estimate for estimate in estimates if estimate is not None and math.isfinite(estimate.mean)]
    return number_format([estimate.mean for estimate in finite], [estimate.error for estimate in finite])


def _estimate(estimate: Estimate | None, write: Callable[[float], str]) -> Cell:
    if estimate is None or not estimate.values:
        return Cell(MISSING)
    if not math.isfinite(estimate.mean):
        return Cell(str(estimate.mean))
    error = f" ± {write(estimate.error)}" if math.isfinite(estimate.error) else ""
    return Cell(write(estimate.mean) + error, estimate.verdict)


def _intervals(estimates: Sequence[Estimate | None]) -> list[Cell]:
    """Return a column of intervals, with the digits of the means."""
    write = _format_for(estimates)
    ends = [estimate.interval if estimate and math.isfinite(estimate.mean) else (math.nan, math.nan) for estimate in estimates]
    return [Cell(f"{write(low)} to {write(high)}" if math.isfinite(low) else MISSING) for low, high in ends]


def _numbers(numbers: Sequence[float], decimals: int | None = None) -> list[Cell]:
    """Return a column of numbers without errors; its last cell is empty."""
    write = number_format(numbers, decimals=decimals)
    return [*(Cell(MISSING if math.isnan(number) else write(number)) for number in numbers), Cell("")]


def csv_lines(run_table: RunTable) -> list[dict[str, Any]]:
    """Return a line for each method and quantity; several values in a field are separated by blanks, in the order of seeds."""
    lines: list[dict[str, Any]] = []
    for row in run_table.rows:
        ids = {run.seed: run.run_id for run in row.runs}
        method = {"method": row.label, "loss_method": row.loss_method, "gradient_method": row.gradient_method}
        for name, estimate in ({"delta_m": row.delta_m} | dict(row.metrics)).items():
            if estimate is not None:
                lines.append(method | {"quantity": name} | summary(estimate) | _joined_values(estimate, ids))
        for name, number in (("mean_rank", row.mean_rank), ("time", row.time), ("memory", row.memory)):
            lines.append(method | {"quantity": name, "mean": number})
    for name, number in (run_table.baselines or {}).items():
        lines.append({"method": SINGLE_TASK, "quantity": name, "mean": number})
    return lines


def _joined_values(estimate: Estimate, run_ids: Mapping[int, str]) -> dict[str, str]:
    fields = {
        "seeds": estimate.values.keys(),
        "values": map(float, estimate.values.values()),
        "run_ids": (run_ids.get(seed, "") for seed in estimate.values),
    }
    return {key: " ".join(map(str, values)) for key, values in fields.items()}


def csv_text(lines: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return the lines with a header; a missing field is empty."""
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def json_content(run_table: RunTable) -> dict[str, Any]:
    """Return the whole content of the comparison."""
    return {
        "experiment": run_table.experiment,
        "metrics": [{"name": name, "higher_is_better": name in run_table.higher_is_better} for name in run_table.metrics],
        "baselines": run_table.baselines,
        "baselines_from": run_table.baselines_from,
        "mean_ranks_are_among": [row.label for row in run_table.rows],  # without them the ranks mean nothing
        "rows": [_json_row(row) for row in run_table.rows],
        "notes": run_table.notes,
    }


def _json_row(row: Row) -> dict[str, Any]:
    return {
        "method": row.label,
        "loss_method": row.loss_method,
        "gradient_method": row.gradient_method,
        "runs": [{"run_id": run.run_id, "seed": run.seed} for run in row.runs],
        "seeds": row.seeds,
        "failed": row.failed,
        "delta_m": row.delta_m and summary_with_values(row.delta_m),
        "mean_rank": row.mean_rank,
        "metrics": {name: summary_with_values(estimate) for name, estimate in row.metrics.items()},
        "time": row.time,
        "memory": row.memory,
    }


def json_text(content: Any) -> str:
    """Return the content as JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary(estimate: Estimate) -> dict[str, Any]:
    """Return mean, standard error, interval and verdict with all digits."""
    low, high = estimate.interval
    return {
        "mean": estimate.mean,
        "standard_error": estimate.error,
        "low": low,
        "high": high,
        "verdict": estimate.verdict,
    }


def summary_with_values(estimate: Estimate) -> dict[str, Any]:
    """Return the summary and the value of each seed."""
    return summary(estimate) | {"values": {str(seed): value for seed, value in estimate.values.items()}}


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
