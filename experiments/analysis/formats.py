"""Lines of cells -> text, for the terminal, for Markdown and for LaTeX."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from experiments.analysis.comparison import Verdict

MISSING = "\N{EN DASH}"
MARKS = {"alike": "≈", "unclear": "?"}
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


class Sheet(NamedTuple):
    """A table without its form.

    Attributes:
        header: Names of the columns.
        lines: A cell for each column; the first is the method.
        methods: How many of the lines are methods; those below are single-task networks.
        legend: What to say below the table.
        title: What to say above it; empty for nothing.
    """

    header: list[str]
    lines: list[list[Cell]]
    methods: int
    legend: str
    title: str = ""


def terminal(sheet: Sheet) -> Table:
    """For rich; a table that is wider than a terminal gets two lines for each row."""
    width = sum(max(len(cell.marked) for cell in column) + 2 for column in zip(*sheet.lines, strict=True))
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(sheet.title, "bold") if sheet.title else None,
        title_justify="left",
        caption=Text(sheet.legend),
        caption_justify="left",
    )
    for k, title in enumerate(sheet.header):
        words = re.sub(r"(?<=[/_])(?=\S)", " ", re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", title))
        name = re.sub(r"(?<=[/_]) ", "", textwrap.fill(words, 8, break_long_words=False))
        table.add_column(Text(name), justify="right" if k else "left", no_wrap=True)  # rather an ellipsis than half a number
    for k, line in enumerate(sheet.lines):
        if k == sheet.methods:
            table.add_section()
        style = "dim" if k >= sheet.methods else ""
        texts = [re.sub(r" (?=[±+] |to |networks|\()", "\n", cell.marked) if width > TERMINAL else cell.marked for cell in line]
        table.add_row(
            *(Text(text, "bold" if cell.verdict == "best" else style) for cell, text in zip(line, texts, strict=True))
        )
    return table


def markdown(sheet: Sheet) -> str:
    """A table with its legend below it."""
    written = [
        [f"**{text}**" if cell.verdict == "best" else text for cell in line for text in [escaped_markdown(cell.marked)]]
        for line in sheet.lines
    ]
    rule = ["---", *["---:"] * (len(sheet.header) - 1)]
    table = [[escaped_markdown(name) for name in sheet.header], rule, *written]
    title = f"**{escaped_markdown(sheet.title)}**\n\n" if sheet.title else ""
    return title + "\n".join(f"| {' | '.join(line)} |" for line in table) + f"\n\n{escaped_markdown(sheet.legend)}\n"


def escaped_markdown(text: str) -> str:
    """The text, none of whose characters is markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


TO_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    | {MISSING: "--"}
)


def latex(sheet: Sheet) -> str:
    r"""A ``table`` for booktabs; the minus of a number is a minus, not a hyphen."""
    written = [
        [line[0].text.translate(TO_LATEX), *(_latex_number(cell) for cell in line[1:])]  # a hyphen in a label stays one
        for line in sheet.lines
    ]
    body = [" & ".join(line) + r" \\" for line in written]
    if len(body) > sheet.methods:
        body.insert(sheet.methods, r"\midrule")
    columns = "l" + "r" * (len(sheet.header) - 1)
    table = [
        r"\toprule",
        " & ".join(name.translate(TO_LATEX) for name in sheet.header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
    ]
    caption = " ".join(filter(None, (f"{sheet.title}." if sheet.title else "", sheet.legend)))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption.translate(TO_LATEX)}}}",
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
