"""A comparison -> table: for the terminal, for Markdown and LaTeX, and with all digits for CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from experiments.analysis.formats import MISSING, Cell, Sheet, latex, markdown, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from experiments.analysis.comparison import Comparison, Estimate, Row

Format = Literal["table", "markdown", "latex", "csv", "json"]

SINGLE_TASK = "single-task networks"
METRICS_IN_TERMINAL = 6  # more columns would leave each a letter wide
ESTIMATED = ("mean", "standard_error", "low", "high", "verdict", "seeds", "values", "run_ids")
COLUMNS = ("method", "loss_method", "gradient_method", "quantity", *ESTIMATED)  # of CSV


@overload
def render(comparison: Comparison, form: Literal["table"]) -> Table: ...
@overload
def render(comparison: Comparison, form: Literal["markdown", "latex", "csv", "json"]) -> str: ...
def render(comparison: Comparison, form: Format) -> Table | str:
    """The comparison in one of the formats; ``csv`` and ``json`` have all digits, the others are rounded and have a legend."""
    forms: dict[str, Callable[[Comparison], Table | str]] = {
        "table": lambda whole: terminal(for_terminal(whole)),
        "markdown": lambda whole: markdown(sheet(whole)),
        "latex": lambda whole: latex(sheet(whole)),
        "csv": lambda whole: csv_text(csv_lines(whole)),
        "json": lambda whole: json_text(json_content(whole)),
    }
    return forms[form](comparison)


def cells(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Header and rows; where baselines are known, the last row is that of the single-task networks.

    Columns that no row has anything in are left out.
    """
    rows = comparison.rows
    columns: dict[str, list[Cell]] = {
        "method": [*(Cell(row.label) for row in rows), Cell(SINGLE_TASK)],
        "seeds": [*(Cell(_seeds(row)) for row in rows), Cell("")],
    }
    if any(row.delta_m for row in rows):
        drops = [row.delta_m for row in rows]
        columns["delta_m % ↓"] = _estimates(drops, 0.0)
        columns["95 % interval"] = [*_intervals(drops), Cell("")]
    columns["mean rank ↓"] = _numbers([row.mean_rank for row in rows], decimals=2)
    for name in comparison.metrics:
        arrow = "↑" if name in comparison.higher_is_better else "↓"
        baseline = (comparison.baselines or {}).get(name, math.nan)
        columns[f"{name} {arrow}"] = _estimates([row.metrics.get(name) for row in rows], baseline)
    columns["time / ls"] = _numbers([row.time for row in rows], decimals=2)
    columns["memory MiB"] = _numbers([row.memory for row in rows])
    columns = {name: column for name, column in columns.items() if any(cell.text != MISSING for cell in column[: len(rows)])}
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return list(columns), lines if comparison.baselines else lines[:-1]


def sheet(comparison: Comparison) -> Sheet:
    """The table in no form yet."""
    header, lines = cells(comparison)
    return Sheet(header, lines, len(comparison.rows), legend(comparison))


def legend(comparison: Comparison) -> str:
    """What the signs and columns of the table mean."""
    header, lines = cells(comparison)
    verdicts = {cell.verdict for line in lines for cell in line}
    signs = ["mean ± standard error over seeds"]
    signs += ["bold: best mean"] if "best" in verdicts else []
    signs += ["≈: not distinguishable from the best"] if "alike" in verdicts else []
    signs += ["?: too few seeds to tell it from the best"] if "unclear" in verdicts else []
    sentences = ["; ".join(signs).capitalize() + "."]
    if "delta_m % ↓" in header:
        source = f" ({comparison.baselines_from})" if comparison.baselines_from else ""
        sentences.append(f"delta_m: mean relative drop against single-task networks{source}; below 0 beats them.")
    if "mean rank ↓" in header:
        sentences.append(f"Mean rank: among these {len(comparison.rows)} methods only.")
    if "time / ls" in header:
        sentences.append("time / ls: duration of a training step relative to that of ls.")
    if "memory MiB" in header:
        sentences.append("memory: what a step needs beside parameters and the optimizer's state.")
    return " ".join(sentences)


def number_format(
    numbers: Iterable[float], errors: Iterable[float] = (), decimals: int | None = None
) -> Callable[[float], str]:
    """How to write the numbers of one column: all with the same digits after the point.

    Args:
        numbers: Of the column.
        errors: Their standard errors, whose median decides: it gets two digits if it starts with 1 or 2, else one, and one
            more where the smallest would become zero. Without errors, the largest number gets three digits.
        decimals: Digits after the point, if that is known already.

    Returns:
        A function from a number to its text; NaN and infinity stay words.
    """
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    sizes = [error for error in errors if math.isfinite(error) and error > 0]
    if decimals is None:
        size = statistics.median(sizes) if sizes else largest
        exponent = math.floor(math.log10(size)) if size > 0 else 0
        decimals = (int(size < 3 * 10.0**exponent) if sizes else 2) - exponent
        decimals += bool(sizes) and round(min(sizes), decimals) == 0
    notation = "e" if decimals > 6 or largest >= 1e7 else "f"
    digits = 2 if notation == "e" else max(decimals, 0)
    return lambda number: f"{round(number, digits) + 0.0 if notation == 'f' else number:.{digits}{notation}}"  # no "-0.0"


def _seeds(row: Row) -> str:
    return f"{len(row.runs)}, {row.failed} failed" if row.failed else f"{len(row.runs)}"


def _estimates(estimates: Sequence[Estimate | None], baseline: float) -> list[Cell]:
    """A column of means with standard errors, the baseline last."""
    write = _format_of(estimates)
    return [*(_estimate(estimate, write) for estimate in estimates), Cell(MISSING if math.isnan(baseline) else write(baseline))]


def _format_of(estimates: Sequence[Estimate | None]) -> Callable[[float], str]:
    known = [estimate for estimate in estimates if estimate is not None and math.isfinite(estimate.mean)]
    return number_format([estimate.mean for estimate in known], [estimate.error for estimate in known])


def _estimate(estimate: Estimate | None, write: Callable[[float], str]) -> Cell:
    if estimate is None or not estimate.values:
        return Cell(MISSING)
    if not math.isfinite(estimate.mean):
        return Cell(str(estimate.mean))
    error = f" ± {write(estimate.error)}" if math.isfinite(estimate.error) else ""
    return Cell(write(estimate.mean) + error, estimate.verdict)


def _intervals(estimates: Sequence[Estimate | None]) -> list[Cell]:
    """A column of intervals, with the digits of the means."""
    write = _format_of(estimates)
    ends = [estimate.interval if estimate and math.isfinite(estimate.mean) else (math.nan, math.nan) for estimate in estimates]
    return [Cell(f"{write(low)} to {write(high)}" if math.isfinite(low) else MISSING) for low, high in ends]


def _numbers(numbers: Sequence[float], decimals: int | None = None) -> list[Cell]:
    """A column of numbers that have no error, nothing last."""
    write = number_format(numbers, decimals=decimals)
    return [*(Cell(MISSING if math.isnan(number) else write(number)) for number in numbers), Cell("")]


def for_terminal(comparison: Comparison, most_metrics: int = METRICS_IN_TERMINAL) -> Sheet:
    """With the first metrics only."""
    shown = replace(comparison, metrics=comparison.metrics[:most_metrics])
    made, hidden = sheet(shown), len(comparison.metrics) - len(shown.metrics)
    return made._replace(legend=made.legend + further(hidden))


def further(hidden: int) -> str:
    """What to say of metrics that the terminal has no room for."""
    return f" {hidden} further metrics are in the other formats." if hidden else ""


def csv_lines(comparison: Comparison) -> list[dict[str, Any]]:
    """A line for each method and quantity; what holds several values has blanks between them, in the order of the seeds."""
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        ids = {run.seed: run.run_id for run in row.runs}
        method = {"method": row.label, "loss_method": row.loss_method, "gradient_method": row.gradient_method}
        for name, estimate in ({"delta_m": row.delta_m} | dict(row.metrics)).items():
            if estimate is not None:
                of_seeds = {
                    "seeds": estimate.values.keys(),
                    "values": map(float, estimate.values.values()),
                    "run_ids": (ids.get(seed, "") for seed in estimate.values),
                }
                joined = {key: " ".join(map(str, values)) for key, values in of_seeds.items()}
                lines.append(method | {"quantity": name} | summary(estimate) | joined)
        for name, number in (("mean_rank", row.mean_rank), ("time", row.time), ("memory", row.memory)):
            lines.append(method | {"quantity": name, "mean": number})
    for name, number in (comparison.baselines or {}).items():
        lines.append({"method": SINGLE_TASK, "quantity": name, "mean": number})
    return lines


def csv_text(lines: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The lines with a header; what a line does not have is empty."""
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return written.getvalue()


def json_content(comparison: Comparison) -> dict[str, Any]:
    """All that the comparison holds."""
    return {
        "experiment": comparison.experiment,
        "metrics": [{"name": name, "higher_is_better": name in comparison.higher_is_better} for name in comparison.metrics],
        "baselines": comparison.baselines,
        "baselines_from": comparison.baselines_from,
        "mean_ranks_are_among": [row.label for row in comparison.rows],  # without them the ranks mean nothing
        "rows": [
            {
                "method": row.label,
                "loss_method": row.loss_method,
                "gradient_method": row.gradient_method,
                "runs": [{"run_id": run.run_id, "seed": run.seed} for run in row.runs],
                "seeds": row.seeds,
                "failed": row.failed,
                "delta_m": row.delta_m and with_values(row.delta_m),
                "mean_rank": row.mean_rank,
                "metrics": {name: with_values(estimate) for name, estimate in row.metrics.items()},
                "time": row.time,
                "memory": row.memory,
            }
            for row in comparison.rows
        ],
        "notes": comparison.notes,
    }


def json_text(content: Mapping[str, Any]) -> str:
    """The content; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary(estimate: Estimate) -> dict[str, Any]:
    """What is told of an estimate, with all digits."""
    low, high = estimate.interval
    return {
        "mean": estimate.mean,
        "standard_error": estimate.error,
        "low": low,
        "high": high,
        "verdict": estimate.verdict,
    }


def with_values(estimate: Estimate) -> dict[str, Any]:
    """That, and the value of each seed."""
    return summary(estimate) | {"values": {str(seed): value for seed, value in estimate.values.items()}}


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
