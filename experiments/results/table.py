"""A comparison -> table: for the terminal, for Markdown and LaTeX, and with all digits for CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from experiments.results.comparison import Comparison, Estimate, Row, Verdict

Format = Literal["table", "markdown", "latex", "csv", "json"]

SINGLE_TASK = "single-task networks"
MISSING = "\N{EN DASH}"
MARKS = {"alike": "≈", "unclear": "?"}
METRICS_IN_TERMINAL = 6  # more columns would leave each a letter wide
TERMINAL = 100


class Cell(NamedTuple):
    """A number as text, and what can be said of it beside the best of its column; None where nothing can."""

    text: str
    verdict: Verdict | None = None

    @property
    def mark(self) -> str:
        """Sign of the verdict; empty where the best is bold and the worse is plain."""
        return MARKS.get(self.verdict or "", "")

    @property
    def marked(self) -> str:
        """The text with that sign."""
        return f"{self.text} {self.mark}".rstrip()


@overload
def render(comparison: Comparison, form: Literal["table"]) -> Table: ...
@overload
def render(comparison: Comparison, form: Literal["markdown", "latex", "csv", "json"]) -> str: ...
def render(comparison: Comparison, form: Format) -> Table | str:
    """The comparison in one of the formats; ``csv`` and ``json`` have all digits, the others are rounded and have a legend."""
    forms: dict[str, Callable[[Comparison], Table | str]] = {
        "table": _terminal,
        "markdown": _markdown,
        "latex": _latex,
        "csv": _csv,
        "json": _json,
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


def _terminal(comparison: Comparison) -> Table:
    """For rich; a table that is wider than a terminal gets two lines for each row."""
    shown = replace(comparison, metrics=comparison.metrics[:METRICS_IN_TERMINAL])
    hidden = len(comparison.metrics) - len(shown.metrics)
    header, lines = cells(shown)
    caption = legend(shown) + (f" {hidden} further metrics are in the other formats." if hidden else "")
    width = sum(max(len(cell.marked) for cell in column) + 2 for column in zip(*lines, strict=True))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=Text(caption), caption_justify="left")
    for k, title in enumerate(header):
        words = re.sub(r"/(?=\S)", "/ ", re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", title))
        name = textwrap.fill(words, 8, break_long_words=False)
        table.add_column(Text(name), justify="right" if k else "left", no_wrap=True)  # rather an ellipsis than half a number
    for k, line in enumerate(lines):
        if k == len(comparison.rows):
            table.add_section()
        style = "dim" if k == len(comparison.rows) else ""
        texts = [re.sub(r" (?=[±+] |to |networks)", "\n", cell.marked) if width > TERMINAL else cell.marked for cell in line]
        table.add_row(
            *(Text(text, "bold" if cell.verdict == "best" else style) for cell, text in zip(line, texts, strict=True))
        )
    return table


def _markdown(comparison: Comparison) -> str:
    header, lines = cells(comparison)
    written = [
        [f"**{text}**" if cell.verdict == "best" else text for cell in line for text in [_escaped_markdown(cell.marked)]]
        for line in lines
    ]
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = [[_escaped_markdown(name) for name in header], rule, *written]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + f"\n\n{_escaped_markdown(legend(comparison))}\n"


def _escaped_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


TO_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    | {MISSING: "--"}
)


def _latex(comparison: Comparison) -> str:
    r"""A ``table`` for booktabs; the minus of a number is a minus, not a hyphen."""
    header, lines = cells(comparison)
    written = [
        [line[0].text.translate(TO_LATEX), *(_latex_number(cell) for cell in line[1:])]  # a hyphen in a label stays one
        for line in lines
    ]
    body = [" & ".join(line) + r" \\" for line in written]
    if len(body) > len(comparison.rows):
        body.insert(-1, r"\midrule")
    columns = "l" + "r" * (len(header) - 1)
    table = [
        r"\toprule",
        " & ".join(name.translate(TO_LATEX) for name in header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
    ]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{legend(comparison).translate(TO_LATEX)}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            *(f"    {line}" for line in table),
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_number(cell: Cell) -> str:
    text = re.sub(r"-(?=[\d]|inf)", "$-$", cell.marked.translate(TO_LATEX))
    return rf"\textbf{{{text}}}" if cell.verdict == "best" else text


def _csv(comparison: Comparison) -> str:
    """A line for each method and quantity; what holds several values has blanks between them, in the order of the seeds."""
    written = io.StringIO()
    estimated = ("mean", "standard_error", "low", "high", "verdict", "seeds", "values", "run_ids")
    writer = csv.DictWriter(written, ("method", "loss_method", "gradient_method", "quantity", *estimated), lineterminator="\n")
    writer.writeheader()
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
                writer.writerow(method | {"quantity": name} | _summary(estimate) | joined)
        for name, number in (("mean_rank", row.mean_rank), ("time", row.time), ("memory", row.memory)):
            writer.writerow(method | {"quantity": name, "mean": number})
    for name, number in (comparison.baselines or {}).items():
        writer.writerow({"method": SINGLE_TASK, "quantity": name, "mean": number})
    return written.getvalue()


def _json(comparison: Comparison) -> str:
    """All that the comparison holds; NaN and infinity, which JSON does not have, are null."""
    content = {
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
                "delta_m": row.delta_m and _with_values(row.delta_m),
                "mean_rank": row.mean_rank,
                "metrics": {name: _with_values(estimate) for name, estimate in row.metrics.items()},
                "time": row.time,
                "memory": row.memory,
            }
            for row in comparison.rows
        ],
        "notes": comparison.notes,
    }
    return json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _summary(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval
    return {
        "mean": estimate.mean,
        "standard_error": estimate.error,
        "low": low,
        "high": high,
        "verdict": estimate.verdict,
    }


def _with_values(estimate: Estimate) -> dict[str, Any]:
    return _summary(estimate) | {"values": {str(seed): value for seed, value in estimate.values.items()}}


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
