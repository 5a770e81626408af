"""Tables and figures of the newest records of benchmarks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from generated import add_directive
from method_facts import newest

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
sys.path.append(str(DOCS.parent / "benchmarks"))  # whose scripts import each other by their names

from show import (  # noqa: E402 - after the path is set
    common_words,
    many_tasks_table,
    metrics_table,
    ratios_table,
    rules_table,
    steps_table,
    threads_table,
    times_table,
    transposed_table,
)

NUM_TASKS = 11  # of the table of steps, unless the directive gives another number


class Form(NamedTuple):
    """The form in which a record is shown.

    Attributes:
        record: Kind of the record in the names of files.
        table: Function of the results and of the further words of the directive, which returns a table in Markdown.
        legend: Sentences about the numbers.
    """

    record: str
    table: Callable[[dict[str, Any], str], str]
    legend: str


RELATIVE = "Time of a step relative to the first row; medians."
FORMS = {
    "rules": Form(
        "rules",
        lambda results, _: rules_table(results),
        "Milliseconds for one solve, and in brackets the time of TorchJD in the same run as a multiple; medians. "
        "The error is the certificate of the rule.",
    ),
    "steps": Form(
        "jacobian",
        lambda results, words: steps_table(results, int(words or NUM_TASKS)),
        "Time of a step relative to an ordinary step; medians. In brackets the memory above the memory of an ordinary step, "
        "relative to the Jacobian.",
    ),
    "overhead": Form("overhead", lambda results, _: ratios_table(results), f"{RELATIVE} The clock is the time of the thread."),
    "engines": Form(
        "engines",
        lambda results, _: transposed_table(results),
        "Time of a step relative to an ordinary step, with IMTL-G; medians of the time of the thread.",
    ),
    "step": Form("step", lambda results, _: ratios_table(results), RELATIVE),
    "per_sample": Form("per_sample", lambda results, _: ratios_table(results), f"{RELATIVE} K is the number of samples."),
    "distributed": Form("distributed", lambda results, _: ratios_table(results), f"{RELATIVE} Two processes on one machine."),
    "llm": Form(
        "llm",
        lambda results, _: ratios_table(results),
        f"{RELATIVE} In brackets the peak memory of a step, without the model.",
    ),
    "many_tasks": Form(
        "many_tasks",
        lambda results, words: many_tasks_table(results, words or "heads"),
        "Medians of CPU time. Steps relative to the first row, and in brackets the peak memory; rules in milliseconds.",
    ),
    "agent": Form(
        "agent",
        lambda results, _: times_table(results),
        "Medians of the wall clock; in brackets relative to a step of the critics without the stage.",
    ),
    "threads": Form("threads", lambda results, _: threads_table(results), "Milliseconds of a training step; medians."),
    "optimizer_metric": Form(
        "optimizer_metric",
        lambda results, _: metrics_table(results),
        "Share of steps that raise some loss of their batch, to first order.",
    ),
}


def recorded(kind: str, suffix: str) -> Path:
    """Return the newest file of a kind of benchmark.

    Raises:
        ValueError: If no file has that kind.
    """
    file = newest(kind, suffix)
    if file is None:
        raise ValueError(f"benchmarks/results must contain a record of the kind '{kind}', but has none.")
    return file


def benchmark_table(argument: str, docname: str = "") -> str:  # noqa: ARG001 - directives give the page
    """Return the table of the newest record of a kind, and a caption that names the record.

    Args:
        argument: A name in `FORMS`; ``steps`` may be followed by the number of tasks.
        docname: Page with the table.

    Raises:
        ValueError: If the name is unknown, or nothing is recorded.
    """
    name, _, words = argument.partition(" ")
    if name not in FORMS:
        raise ValueError(f"benchmark-table must be one of {', '.join(FORMS)}, but got '{name}'.")
    form = FORMS[name]
    file = recorded(form.record, "json")
    record = json.loads(file.read_text(encoding="utf-8"))
    made = form.table(record["results"], words)
    return f":::{{container}} wide-table numbers\n{made}\n:::\n\n{caption(file, record, form.legend)}"


def caption(file: Path, record: dict[str, Any], legend: str) -> str:
    """Return sentences about a table: the numbers, and the record with its date and its machine."""
    date, _, machine = file.stem.partition("_")
    machine = machine.rpartition("_")[0]
    for kind in sorted({form.record for form in FORMS.values()}, key=len, reverse=True):
        machine = machine.removeprefix(f"{kind}_")
    results = record["results"]
    shared = common_words(results) if isinstance(results, dict) else []
    conditions = ", ".join([word.replace("=", " = ") for word in shared])
    threads = record.get("threads")
    setting = [date, machine, f"torch {record.get('torch')}", f"{threads} thread" + ("s" if threads != 1 else "")]
    where = f" Common to all columns: {conditions}." if conditions else ""
    return f"*{legend}{where} Record `{file.name}`: {', '.join(setting)}.*"


def benchmark_figure(kind: str, docname: str) -> str:
    """Return the figure of the newest record of a kind, and a caption that names the record.

    Args:
        kind: Kind of the record, such as ``jacobian``.
        docname: Page with the figure.

    Raises:
        ValueError: If no record of that kind has a figure.
    """
    figure = recorded(kind, "png")
    path = os.path.relpath(figure, (DOCS / docname).parent)
    text = "Time over the number of tasks"
    return f"![{text}]({path})\n\n*{text}. Record `{figure.with_suffix('.json').name}`.*"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives ``benchmark-table`` and ``benchmark-figure``."""
    add_directive(app, "benchmark-table", benchmark_table)
    add_directive(app, "benchmark-figure", benchmark_figure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
