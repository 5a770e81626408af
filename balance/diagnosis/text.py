"""Diagnosis as text: tables of the statistics and costs, and numbered recommendations."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from .findings import number
from .statistics import median, ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from ..profiling import Cost
    from .statistics import Price, Statistics

WIDTH, NAME, PAIRS = 100, 20, 15  # of a report: columns, letters of a task, pairs of tasks


def title(num_tasks: int, num_parameters: int, num_batches: int, steps: int, lr: float) -> str:
    """Return the first paragraph: the size of the problem, and the training between the two measurements."""
    text = (
        f"{num_tasks} tasks on {num_parameters} shared parameters, seen on {num_batches} batches before and after "
        f"{steps} steps of Adam on the plain sum of the losses (learning rate {lr:g})."
    )
    return textwrap.fill(text, WIDTH)


def losses(start: Statistics, end: Statistics) -> str:
    """Return the table of the losses."""
    both = (start.losses, end.losses)
    columns = [column for values in both for column in (median(values), values.amin(dim=0), values.amax(dim=0))]
    ratios = [cell for values in both for cell in (number(ratio(values)), "", "")]
    header = ["LOSS", "before", "least", "largest", "after", "least", "largest"]
    rows = [*_by_task(start.tasks, columns), ["largest / smallest", *ratios]]
    return _table(header, rows, "Median, least and largest of the batches.")


def gradients(start: Statistics, end: Statistics) -> str:
    """Return the table of the lengths of the task gradients."""
    values = [start.norms, end.norms, start.relative_norms, end.relative_norms]
    shares = [[_percent(share) for share in statistics.shares.tolist()] for statistics in (start, end)]
    rows = [
        [*row, *percent]
        for row, percent in zip(_by_task(start.tasks, map(median, values)), zip(*shares, strict=True), strict=True)
    ]
    rows.append(["longest / shortest", *(number(ratio(v)) for v in values), "", ""])
    header = ["GRADIENT LENGTH", "before", "after", "per loss: before", "after", "share: before", "after"]
    note = "On the shared parameters, median of the batches; divided by the loss; share in the plain sum of the gradients."
    return _table(header, rows, note)


def cosines(start: Statistics, end: Statistics) -> str:
    """Return the table of the cosines between task gradients, most negative first if not all are shown."""
    pairs = list(zip(start.pairs, end.pairs, strict=True))
    shown = pairs if len(pairs) <= PAIRS else sorted(pairs, key=lambda pair: pair[1].mean)[:PAIRS]
    rows = [
        [
            " - ".join(map(_short, old.tasks)),
            *(f"{p.mean:+.2f} ± {p.spread:.2f}" for p in (old, new)),
            old.reading,
            new.reading,
        ]
        for old, new in shown
    ]
    if len(shown) < len(pairs):
        rows.append([f"({len(pairs) - len(shown)} more, less negative)", "", "", "", ""])
    shares = [f"{100 * statistics.conflict_share:.0f} %" for statistics in (start, end)]
    rows.append(["share below 0", *shares, "", ""])
    note = "Between the gradients of two tasks: mean ± standard deviation over the batches. Noise: the sign is not stable."
    return _table(["COSINE", "before", "after", "reading: before", "after"], rows, note)


def costs(baseline: Cost, loss_prices: Mapping[str, Price], gradient_prices: Mapping[str, Price]) -> str:
    """Return the table of the costs of a step, and the reasons against methods that do not run or do not train."""
    plain = [f"{1000 * baseline.seconds:.3g} ms", f"{baseline.bytes / 2**20:.3g} MiB"]
    rows, reasons = [["plain step", *plain, ""]], []
    for kind, prices in (("losses", loss_prices), ("gradients", gradient_prices)):
        for name, price in prices.items():
            if price.cost is not None:
                rows.append([name, f"{price.time:.1f} x", f"{price.memory:.1f} x", kind])
            if price.reason:
                problem = "does not run" if price.cost is None else "is no choice"
                reasons.append(textwrap.fill(f"{name} {problem}: {price.reason}", WIDTH, subsequent_indent="   "))
    note = "Forward, backward and balancing, without the optimizer; peak memory above the model and the batch."
    return "\n".join([_table(["COST OF A STEP", "time", "memory", "balances"], rows, note), *reasons])


def recommendation(sentences: Sequence[str]) -> str:
    """Return the numbered recommendations."""
    numbered = [
        textwrap.fill(sentence, WIDTH, initial_indent=f"{n}. ", subsequent_indent="   ")
        for n, sentence in enumerate(sentences, start=1)
    ]
    return "\n".join(["Recommendation", *numbered])


def _by_task(tasks: Sequence[str], columns: Iterable[Tensor]) -> list[list[str]]:
    rows = zip(tasks, *(column.tolist() for column in columns), strict=True)
    return [[_short(task), *map(number, row)] for task, *row in rows]


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f} %" if math.isfinite(share) else "-"  # + 0.0 turns -0.0 into 0.0


def _short(task: str) -> str:
    return task if len(task) <= NAME else f"{task[: NAME - 1]}…"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    """Return columns that are flush right but for the first, and a note below."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for first, *rest in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], textwrap.fill(note, WIDTH)])
