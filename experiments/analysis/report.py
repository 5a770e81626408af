"""A comparison and its figures -> one HTML page that needs nothing else."""

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

from experiments.analysis import published as papers
from experiments.analysis.comparison import CONFIDENCE, ENOUGH_SEEDS
from experiments.analysis.figures.figures import CAPTIONS
from experiments.analysis.tables import number_format, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.analysis.comparison import Comparison, Estimate, Row, Verdict
    from experiments.analysis.formats import Sheet
    from experiments.analysis.published import Beside

LARGEST_SVG = 400_000  # bytes; beyond that the smaller of SVG and PNG is taken


class Picture(NamedTuple):
    """A figure as the page has it: image in a data URI, caption, alternative text, width in inches."""

    name: str
    uri: str
    caption: str
    width: float


def html(
    comparison: Comparison,
    figures: Mapping[str, Figure],
    tables: Sequence[Beside] = (),
    *,
    title: str,
    command: str | None = None,
    created: datetime | None = None,
) -> str:
    """The page.

    Args:
        comparison: What to report.
        figures: By name, in the order of the page; a name that begins as one of `CAPTIONS` gets that caption.
        tables: Published results, which get a section of their own.
        title: Heading of the page.
        command: What made it, to be run again.
        created: When; None for now.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = sheet(comparison)
    return templates.get_template("report.html").render(
        title=title,
        answer=_unbroken(answer(comparison)),
        comparison=comparison,
        results=_unbroken_header(made),
        published=[{"of": of, "sheet": _unbroken_header(papers.sheet(of)), "notes": papers.notes(of)} for of in tables],
        here=papers.HERE,
        pictures=[_picture(name, figure) for name, figure in figures.items()],
        enough=ENOUGH_SEEDS,
        confidence=f"{100 * CONFIDENCE:g} %",
        command=command,
        created=(created or datetime.now().astimezone()).strftime("%Y-%m-%d %H:%M"),
    )


def answer(comparison: Comparison) -> str:
    """Which method is best and what can be told apart from it, in plain sentences."""
    rows = [(row, row.delta_m) for row in comparison.rows if row.delta_m is not None]
    finite = [(row, estimate) for row, estimate in rows if math.isfinite(estimate.mean)]
    if not rows:
        return _answer_without_baselines(comparison)
    if not finite:
        return "No method has a finite delta_m."
    best, estimate = min(finite, key=lambda pair: pair[1].mean)
    others = [(row, other) for row, other in finite if row is not best]
    broken = [row.label for row, other in rows if not math.isfinite(other.mean)]
    sentences = [
        f"{best.label} is best" if others else f"{best.label} is the only method with a result",
        *_by_verdict(others, len(best.runs)),
        f"Not finite: {', '.join(broken)}." if broken else "",
    ]
    sentences[0] += f": delta_m {_in_words(estimate)}, that is, {_beside_single_task(estimate)}."
    return " ".join(filter(None, sentences))


def _answer_without_baselines(comparison: Comparison) -> str:
    best = min(comparison.rows, key=lambda row: row.mean_rank)
    rank = f"{best.mean_rank:.2f} among {len(comparison.rows)} methods"
    return (
        f"{best.label} has the best mean rank: {rank}. Without single-task baselines there is no delta_m; what can be told "
        "apart on each metric is in the table."
    )


def _in_words(estimate: Estimate) -> str:
    write = number_format([estimate.mean], [estimate.error])
    low, high = estimate.interval
    spread = f"95 % interval {write(low)} to {write(high)}" if math.isfinite(low) else "one seed, so no interval"
    return f"{write(estimate.mean)} % ({spread})"


def _beside_single_task(estimate: Estimate) -> str:
    low, high = estimate.interval
    side = "worse" if estimate.mean > 0 else "better"
    doubt = ", which may be chance" if low <= 0 <= high else ""
    return f"its metrics are on average {side} than those of networks that learn one task alone{doubt}"


def _by_verdict(others: list[tuple[Row, Estimate]], seeds: int) -> list[str]:
    """A sentence for each verdict that some of the other rows have."""
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


def _unbroken_header(sheet: Sheet) -> Sheet:
    return sheet._replace(header=[_unbroken(name) for name in sheet.header])


def _unbroken(text: str) -> str:
    """The text without line breaks before a sign or within a pair of methods."""
    for words in (" %", " ±", " ↑", " ↓", " + "):
        text = text.replace(words, words.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _picture(name: str, figure: Figure) -> Picture:
    """The figure as SVG, or as PNG where that is much smaller."""
    svg, png = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": "balance"}):  # the same figure makes the same page
        figure.savefig(svg, format="svg", metadata={"Date": None})
    kind, image = "svg+xml", svg.getvalue()
    if len(image) > LARGEST_SVG:
        figure.savefig(png, format="png", dpi=180)
        kind, image = min((kind, image), ("png", png.getvalue()), key=lambda pair: len(pair[1]))
    caption = next((caption for key, caption in CAPTIONS.items() if name.startswith(key)), name)
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(image).decode()}", caption, figure.get_figwidth())
