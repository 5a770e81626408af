"""Text tables in three forms: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .statistics import Verdict

MISSING = "\N{EN DASH}"
MARKS = {"alike": "≈", "unclear": "?"}
BOLD, STAR = "bold", "*"  # signs of the best of a column in legends
TERMINAL_WIDTH = 100  # characters


class Cell(NamedTuple):
    """A number as text, and its verdict relative to the best of its column; None without a verdict."""

    text: str
    verdict: Verdict | None = None

    @property
    def mark(self) -> str:
        """Sign of the verdict; empty for the best, which is bold, and for the worse, which is plain."""
        return MARKS.get(self.verdict or "", "")

    @property
    def marked(self) -> str:
        """The text with the sign of the verdict."""
        return f"{self.text} {self.mark}".rstrip()


class TextTable(NamedTuple):
    """A table of cells, before it is written in one of the forms.

    Attributes:
        header: Names of the columns.
        lines: A cell for each column; the first is the method.
        methods: Number of lines that are methods; the lines below are single-task networks.
        legend: Text below the table.
        title: Text above the table; empty for none.
    """

    header: list[str]
    lines: list[list[Cell]]
    methods: int
    legend: str
    title: str = ""


def without_bold(table: TextTable) -> TextTable:
    """Return a table in which a star marks the best of a column, for text without bold letters."""
    lines = [[Cell(f"{cell.text} {STAR}") if cell.verdict == "best" else cell for cell in line] for line in table.lines]
    return table._replace(lines=lines, legend=table.legend.replace(f"{BOLD}:", f"{STAR}:"))


def terminal(table: TextTable) -> Table:
    """Return a table for rich; if it is wider than a terminal, each row gets two lines."""
    width = sum(max(len(cell.marked) for cell in column) + 2 for column in zip(*table.lines, strict=True))
    rich_table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(table.title, "bold") if table.title else None,
        title_justify="left",
        caption=Text(table.legend),
        caption_justify="left",
    )
    for k, name in enumerate(table.header):
        justify: Literal["left", "right"] = "right" if k else "left"
        rich_table.add_column(Text(_broken_header(name)), justify=justify, no_wrap=True)  # an ellipsis beats half a number
    for k, line in enumerate(table.lines):
        if k == table.methods:
            rich_table.add_section()
        style = "dim" if k >= table.methods else ""
        texts = [_broken_cell(cell.marked) if width > TERMINAL_WIDTH else cell.marked for cell in line]
        rich_table.add_row(
            *(Text(text, "bold" if cell.verdict == "best" else style) for cell, text in zip(line, texts, strict=True))
        )
    return rich_table


def _broken_header(name: str) -> str:
    """Return the name of a column in lines of about eight characters."""
    words = re.sub(r"(?<=[/_])(?=\S)", " ", re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", name))
    return re.sub(r"(?<=[/_]) ", "", textwrap.fill(words, 8, break_long_words=False))


def _broken_cell(text: str) -> str:
    return re.sub(r" (?=[±+] |to |networks|\()", "\n", text)


def markdown(table: TextTable) -> str:
    """Return a table with its legend below it."""
    written = [
        [f"**{text}**" if cell.verdict == "best" else text for cell in line for text in [escaped_markdown(cell.marked)]]
        for line in table.lines
    ]
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [[escaped_markdown(name) for name in table.header], rule, *written]
    title = f"**{escaped_markdown(table.title)}**\n\n" if table.title else ""
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{escaped_markdown(table.legend)}\n"


def escaped_markdown(text: str) -> str:
    """Return the text with all characters of Markdown escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


TO_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    | {MISSING: "--"}
)


def latex(table: TextTable) -> str:
    r"""Return a ``table`` for booktabs; the minus of a number is a minus, not a hyphen."""
    written = [
        [line[0].text.translate(TO_LATEX), *(_latex_number(cell) for cell in line[1:])]  # a hyphen in a label stays a hyphen
        for line in table.lines
    ]
    body = [" & ".join(line) + r" \\" for line in written]
    if len(body) > table.methods:
        body.insert(table.methods, r"\midrule")
    header = " & ".join(name.translate(TO_LATEX) for name in table.header) + r" \\"
    lines = [r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    columns = "l" + "r" * (len(table.header) - 1)
    caption = " ".join(filter(None, (f"{table.title}." if table.title else "", table.legend)))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption.translate(TO_LATEX)}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            *(f"    {line}" for line in lines),
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_number(cell: Cell) -> str:
    text = re.sub(r"-(?=[\d]|inf)", "$-$", cell.marked.translate(TO_LATEX))
    return rf"\textbf{{{text}}}" if cell.verdict == "best" else text
