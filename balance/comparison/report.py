"""One self-contained HTML page with a comparison and its figures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context

from .figures.gallery import CAPTIONS
from .run_table import main_summary
from .statistics import CONFIDENCE, ENOUGH_SEEDS
from .tables import number_format, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .formats import TextTable
    from .run_table import Row, RunTable
    from .statistics import Estimate, Verdict

LARGEST_SVG = 400_000  # bytes; a larger figure becomes PNG if that is smaller


class Picture(NamedTuple):
    """A figure of the page: image in a data URI, caption, width in inches."""

    name: str
    uri: str
    caption: str
    width: float


class Section(NamedTuple):
    """A further table of the page.

    Attributes:
        table: The table.
        relation: Relation between this table and the compared runs, in sentences; empty for none.
        comparable: Whether the runs can be compared with the table; if not, the relation is a warning.
        notes: Sentences below the table.
        local_prefix: Beginning of the labels of lines that are runs.
    """

    table: TextTable
    relation: str
    comparable: bool
    notes: Sequence[str]
    local_prefix: str


def html(
    run_table: RunTable,
    figures: Mapping[str, Figure],
    sections: Sequence[Section] = (),
    *,
    title: str,
    command: str | None = None,
    created: datetime | None = None,
) -> str:
    """Return the page.

    Args:
        run_table: The comparison to report.
        figures: Figures by name, in the order of the page; a name that begins with a key of `CAPTIONS` gets that caption.
        sections: Further tables.
        title: Heading of the page.
        command: Command that made the page.
        created: Time of creation; None for now.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html").render(
        title=title,
        answer=_unbroken(answer(run_table)),
        run_table=run_table,
        results=_unbroken_header(text_table(run_table)),
        sections=[section._replace(table=_unbroken_header(section.table)) for section in sections],
        pictures=[_picture(name, figure) for name, figure in figures.items()],
        enough=ENOUGH_SEEDS,
        confidence=f"{100 * CONFIDENCE:g} %",
        command=command,
        created=(created or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M"),
    )


def title(run_table: RunTable) -> str:
    """Return the heading of the page."""
    return ", ".join(filter(None, (f"Comparison of methods on {run_table.experiment}", run_table.title)))


def answer(run_table: RunTable) -> str:
    """Return the best method, and the methods that cannot be distinguished from it, in sentences."""
    rows = [(row, row.delta_m) for row in run_table.rows if row.delta_m is not None]
    finite = [(row, estimate) for row, estimate in rows if math.isfinite(estimate.mean)]
    if not rows:
        return _answer_without_baselines(run_table)
    if not finite:
        return "No method has a finite delta_m."
    best, estimate = min(finite, key=lambda pair: pair[1].mean)
    others = [(row, other) for row, other in finite if row is not best]
    broken = [row.label for row, other in rows if not math.isfinite(other.mean)]
    start = f"{best.label} is best" if others else f"{best.label} is the only method with a result"
    sentences = [
        f"{start}: delta_m {_in_words(estimate)}, that is, {_relative_to_single_task(estimate)}.",
        *_by_verdict(others, len(best.runs)),
        f"Not finite: {', '.join(broken)}." if broken else "",
    ]
    return " ".join(filter(None, sentences))


def _answer_without_baselines(run_table: RunTable) -> str:
    if (summary := main_summary(run_table.metrics)) is not None:
        return _answer_of_all_tasks(run_table, summary)
    best = min(run_table.rows, key=lambda row: row.mean_rank)
    rank = f"{best.mean_rank:.2f} among {len(run_table.rows)} methods"
    return (
        f"{best.label} has the best mean rank: {rank}. Without single-task baselines there is no delta_m; the table states "
        "for each metric which methods can be distinguished."
    )


def _answer_of_all_tasks(run_table: RunTable, summary: str) -> str:
    pairs = [(row, row.metrics[summary]) for row in run_table.rows]
    finite = [(row, estimate) for row, estimate in pairs if math.isfinite(estimate.mean)]
    if not finite:
        return f"No method has a finite {summary}."
    best, estimate = finite[0]
    others = finite[1:]
    start = f"{best.label} is best" if others else f"{best.label} is the only method with a result"
    return " ".join(filter(None, [f"{start}: {summary} {_in_words(estimate, '')}.", *_by_verdict(others, len(best.runs))]))


def _in_words(estimate: Estimate, unit: str = " %") -> str:
    write = number_format([estimate.mean], [estimate.error])
    low, high = estimate.interval
    spread = f"95 % interval {write(low)} to {write(high)}" if math.isfinite(low) else "one seed, so no interval"
    return f"{write(estimate.mean)}{unit} ({spread})"


def _relative_to_single_task(estimate: Estimate) -> str:
    low, high = estimate.interval
    side = "worse" if estimate.mean > 0 else "better"
    doubt = ", which may be chance" if low <= 0 <= high else ""
    return f"its metrics are on average {side} than the metrics of single-task networks{doubt}"


def _by_verdict(others: list[tuple[Row, Estimate]], seeds: int) -> list[str]:
    """Return a sentence for each verdict that some of the other rows have."""
    labels: dict[Verdict, list[str]] = {verdict: [] for verdict in ("best", "alike", "worse", "unclear")}
    for row, estimate in others:
        labels[estimate.verdict].append(row.label)
    few = f"{seeds} {'seed is' if seeds == 1 else 'seeds are'} too few to call"
    rest = ", ".join(labels["unclear"]) if labels["worse"] or len(labels["unclear"]) == 1 else "the others"
    sentences = {
        f"Equally good: {', '.join(labels['best'])}.": labels["best"],
        f"Not distinguishable from it: {', '.join(labels['alike'])}.": labels["alike"],
        f"Worse: {', '.join(labels['worse'])}.": labels["worse"],
        f"{few} {rest} worse.": labels["unclear"],
    }
    return [sentence for sentence, needed in sentences.items() if needed]


def _unbroken_header(table: TextTable) -> TextTable:
    return table._replace(header=[_unbroken(name) for name in table.header])


def _unbroken(text: str) -> str:
    """Return the text without line breaks before a sign or within a pair of methods."""
    for words in (" %", " ±", " ↑", " ↓", " + "):
        text = text.replace(words, words.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _picture(name: str, figure: Figure) -> Picture:
    """Return the figure as SVG, or as PNG if the SVG is large and the PNG is smaller."""
    svg, png = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": "balance"}):  # equal figures make equal pages
        figure.savefig(svg, format="svg", metadata={"Date": None})
    kind, image = "svg+xml", svg.getvalue()
    if len(image) > LARGEST_SVG:
        figure.savefig(png, format="png", dpi=180)
        kind, image = min((kind, image), ("png", png.getvalue()), key=lambda pair: len(pair[1]))
    caption = next((caption for key, caption in CAPTIONS.items() if name.startswith(key)), name)
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(image).decode()}", caption, figure.get_figwidth())
