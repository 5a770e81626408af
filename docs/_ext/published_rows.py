"""Published tables row by row, each row with the command that trains it here, or the reason why no command does."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from docstrings import read
from generated import add_directive, to_method, to_page
from generated import table as markdown
from method_facts import REGISTRIES
from omegaconf import OmegaConf

from balance import gradient_balancers
from balance.comparison.formats import MISSING
from balance.comparison.tables import SINGLE_TASK
from balance.config import flatten
from experiments.analysis import published_tables
from experiments.analysis.published_comparison import compare_with_published, text_table
from experiments.config.layers import merge, read_file
from experiments.problems import base as problems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

    from experiments.analysis.published_tables import PublishedTable
    from experiments.config.layers import ProblemFile

RESULTS = Path(__file__).resolve().parents[1] / "experiments/results.md"
STAND_INS = {  # by experiment: the section of the page of results that has runs on the data of the project
    "nyuv2": "Rooms",
    "quantum_chemistry": "Molecules",
    "metaworld": "Three tasks of a robot arm",
}
RUNS = {"three": 3, "ten": 10}  # words of a table for the number of its runs
USUAL_RUNS = 3  # where a table does not state the number
NOT_HERE = {  # reasons of rows whose method is not registered
    "NTKMTL": "the method is not in this library",
    "NTKMTL-SR": "the method is not in this library",
    "IMGrad": "the method is not in this library",
    "Soft Modularization": "a network of modules, which is no method for losses or gradients",
    "SAC with task encoder": "a network with an encoder, which is no method for losses or gradients",
    "Multi-head SAC": "a network with several heads, which is no method for losses or gradients",
    "CARE": "a network with several encoders, which is no method for losses or gradients",
}
RULES = "differences-of-the-rules"  # heading of the table of the differences
WITHOUT_BASELINES = {"metaworld": ("data.tasks=reach", "data.tasks=all")}  # settings of a single task, and of all tasks


class Method(NamedTuple):
    """The registered methods of a row, and settings that belong to the row.

    Attributes:
        loss: Loss balancer.
        gradient: Gradient balancer, if any.
        overrides: Settings of the form ``key=value``.
    """

    loss: str
    gradient: str | None
    overrides: tuple[str, ...]

    @property
    def registered(self) -> tuple[str, str]:
        """Kind and name of the method that names the row."""
        return ("loss", self.loss) if self.gradient is None else ("gradient", self.gradient)


@cache
def pairs() -> dict[str, tuple[str, str | None]]:
    """Return loss method and gradient method by the name of a method in papers, looked up once."""
    return published_tables.registered_methods()


@cache
def problem_file(experiment: str) -> ProblemFile:
    """Return the blocks of a problem's ``config.yaml``, read once."""
    return read_file(experiment)


def method_of(label: str) -> Method | None:
    """Return the methods of a row, whose label may end with variants such as ``, every 50``; None if none is registered.

    Raises:
        ValueError: If a variant is unknown.
    """
    name, *variants = label.split(", ")
    pair = pairs().get(name)
    if pair is None:
        return None
    overrides = [override for variant in variants for override in variant_overrides(label, variant)]
    method = Method(*pair, tuple(overrides))
    kind, registered = method.registered
    restores = "official" in REGISTRIES[kind].options(registered)
    return method._replace(overrides=(*([f"{kind}.official=true"] if restores else []), *overrides))


def variant_overrides(label: str, variant: str) -> list[str]:
    """Return the settings of a variant of a method.

    Raises:
        ValueError: If the variant is unknown.
    """
    if variant == "reproduced":  # another measurement of one setting
        return []
    if found := re.fullmatch(r"every (\d+)", variant):
        return [f"balancer.every={found[1]}"]
    raise ValueError(f"The variant of '{label}' must be 'reproduced' or 'every N', but got '{variant}'.")


def reason_against(label: str) -> str:
    """Return the reason why a row has no command.

    Raises:
        ValueError: If no reason is known.
    """
    if label not in NOT_HERE:
        raise ValueError(f"The row '{label}' must have a registered method or a reason in NOT_HERE, but has neither.")
    return NOT_HERE[label]


def row_command(table: PublishedTable, label: str) -> str | None:
    """Return the command that trains the method of a row as published; None if the method does not exist here."""
    method = method_of(label)
    if method is None:
        return None
    pair = [f"--loss_method={method.loss}"] if method.gradient is None else [f"--gradient_method={method.gradient}"]
    start = ["python experiments/sweep.py", f"--experiment={table.experiment}", *pair, f"--seeds={seeds(table)}"]
    return " ".join([*start, "--no_baselines", *official(table), *method.overrides])


def single_task_command(table: PublishedTable) -> str:
    """Return the command that trains the single-task networks, or the first of them where each needs a command."""
    words = [f"--experiment={table.experiment}", f"--seeds={seeds(table)}"]
    if table.experiment in WITHOUT_BASELINES:
        words = ["sweep.py", *words, *official(table), WITHOUT_BASELINES[table.experiment][0]]
    else:
        words = ["baselines.py", *words, "--output=FILE", *official(table)]
    return f"python experiments/{' '.join(words)}"


def compare_command(table: PublishedTable) -> str:
    """Return the command that prints the table with recorded runs in its setting."""
    chosen = " ".join(["protocol=paper", *distinguishing(table), *WITHOUT_BASELINES.get(table.experiment, ())[1:]])
    return f"python experiments/compare.py --experiment={table.experiment} --published --baselines=none {chosen}"


def seeds(table: PublishedTable) -> int:
    """Return the number of runs over which a table averages."""
    found = re.search(rf"\b({'|'.join(RUNS)}) runs\b", table.conditions)
    return RUNS[found[1]] if found else USUAL_RUNS


def official(table: PublishedTable) -> list[str]:
    """Return the overrides for the data, the protocol and the setting of a table."""
    folder = ["data.path=FOLDER"] if problem_file(table.experiment).on_disk else []
    return [*folder, "protocol=paper", *changes(table)]


def changes(table: PublishedTable) -> list[str]:
    """Return the settings of a table that differ from the published protocol of its problem."""
    if not table.as_published:
        return []
    file = problem_file(table.experiment)
    here = flatten(OmegaConf.create(merge(file.settings, file.on_disk, file.paper or {})))
    return [f"{key}={value}" for key, value in table.as_published.items() if key in here and str(here[key]) != value]


def distinguishing(table: PublishedTable) -> list[str]:
    """Return the settings of a table that differ from the other tables of its experiment."""
    others = [other.as_published for other in published_tables.for_experiment(table.experiment)]
    return [f"{key}={value}" for key, value in table.as_published.items() if any(other.get(key) != value for other in others)]


def printed(table: PublishedTable) -> tuple[str, dict[str, str]]:
    """Return the title of the main column of a table, and its cells by label: delta_m, or else the first metric."""
    text = text_table(compare_with_published(table, None))
    title = next(name for name in text.header if name not in ("method", "source"))
    cells = {line[0].text: line[text.header.index(title)].text for line in text.lines}
    for label in table.methods:
        recomputed = table.delta_m(label) if cells[label] == MISSING else None
        cells[label] = cells[label] if recomputed is None else f"({recomputed:.2f})"
    return title.replace("_", "\\_"), cells


@cache
def recorded(section: str) -> frozenset[tuple[str, str | None]]:
    """Return the pairs of methods with a row in a section of the page of results.

    Raises:
        ValueError: If no such section exists, or it has no rows.
    """
    text = RESULTS.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    names = [line.split(" | ")[0].removeprefix("| ").split(" + ") for line in text.splitlines() if line.startswith("| ")]
    pairs = {(name, None) for name, *more in names if not more} | {
        (loss, gradient) for loss, *rest in names for gradient in rest if gradient in gradient_balancers
    }
    if not pairs:
        raise ValueError(f"{RESULTS} must have rows in a section '{section}', but has none.")
    return frozenset(pairs)


def stand_in_section(table: PublishedTable) -> str | None:
    """Return the section with runs that stand in for a table; None without, and for settings other than the papers'."""
    return STAND_INS.get(table.experiment) if table.setting == "paper" else None


def stand_in(table: PublishedTable, label: str, docname: str) -> str:
    """Return a link to the recorded runs of a row's methods on the data of the project, without numbers; "-" without."""
    section, method = stand_in_section(table), method_of(label)
    variant = ", " in label
    if section is None or method is None or variant or (method.loss, method.gradient) not in recorded(section):
        return "-"
    page = to_page(docname, "experiments/results.md")
    return f"[{section.lower()}]({page}#{section.lower().replace(' ', '-')})"


def row_cells(table: PublishedTable, label: str, docname: str) -> list[str]:
    """Return the cells of a row: method, source, command or reason, differences, run on the data of the project."""
    method, command = method_of(label), row_command(table, label)
    source = table.methods[label].source
    if method is None or command is None:
        return [label, source, f"none: {reason_against(label)}", "-", "-"]
    link = to_method(docname, *method.registered, label)
    return [link, source, f"`{command}`", row_differences(table, label, method), stand_in(table, label, docname)]


def row_differences(table: PublishedTable, label: str, method: Method) -> str:
    """Return the places that name a difference of a row: the table of the rules, the text below, or "-" for none."""
    names = f"{re.escape(label.split(', ', maxsplit=1)[0])}|{method.registered[1]}"
    named = re.search(rf"\b(?:{names})\b", setting_differences(table.experiment))
    places = [f"[rule](#{RULES})"] if differences(method) else []
    return ", ".join([*places, *(["below"] if named else [])]) or "-"


def published_table(name: str, docname: str) -> str:
    """Return a published table: measurement, sources, rows with their commands, comparison, and known differences.

    Args:
        name: Name of the table.
        docname: Page with the table.

    Raises:
        ValueError: If the table is unknown, or a row has neither a method nor a reason.
    """
    return "\n\n".join(table_parts(published_tables.load(name), docname))


def table_parts(table: PublishedTable, docname: str) -> Iterator[str]:
    """Yield the paragraphs about a table."""
    title, numbers = printed(table)
    yield table.conditions
    yield "\n".join(f"- **{key}**: {words.rstrip('.')}." for key, words in table.sources.items())
    rows = [row_cells(table, label, docname) for label in table.methods]
    rows.append([SINGLE_TASK, table.single_task.source, f"`{single_task_command(table)}`", "-", "-"])
    header = ["method", title, "source", "run on the project's data", "differs", "command"]
    shown = numbers | {SINGLE_TASK: numbers.get(SINGLE_TASK, "")}
    labels = [*table.methods, SINGLE_TASK]
    lines = [[row[0], shown[label], row[1], row[4], row[3], row[2]] for label, row in zip(labels, rows, strict=True)]
    yield f":::{{container}} wide-table commands\n{markdown(header, lines, right=(1,))}\n:::"
    place = (
        "The runs appear in the published table" if table.elsewhere else "The runs and, apart from them, the table are printed"
    )
    yield f"{place} with\n\n```bash\n{compare_command(table)}\n```"
    if different := setting_differences(table.experiment):
        yield f"**Differs from the published code.** {different}"


def setting_differences(experiment: str) -> str:
    """Return the differences from the published code in the comments of a problem's ``config.yaml``; empty without."""
    lines = (problems.FOLDER / experiment / "config.yaml").read_text(encoding="utf-8").splitlines()
    comments = "\n".join(line.removeprefix("#").strip() if line.startswith("#") else "" for line in lines)
    if found := re.search(r"\bDiffers: (.+?)(?:\n\n|\Z)", comments, flags=re.DOTALL):
        words = " ".join(found[1].split())
        return words[0].upper() + words[1:]
    other = re.search(r"As in (\w+)/config\.yaml\.", comments)
    return setting_differences(other[1]) if other else ""


def differences(method: Method) -> str:
    """Return the differences of a rule from its paper and its code, from its docstring, in Markdown; empty without."""
    kind, name = method.registered
    text = read(REGISTRIES[kind].method(name).rule).differences
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text.removeprefix("Differs: ")).replace("``", "`")
    return text[:1].upper() + text[1:]


def rules_table(_: str = "", docname: str = "") -> str:
    """Return the differences of every rule with a published row."""
    tables = list(map(published_tables.load, published_tables.names()))
    labels = dict.fromkeys(label.split(", ")[0] for table in tables for label in table.methods)
    methods = {label: method for label in labels if (method := method_of(label))}
    rows = [[to_method(docname, *method.registered, label), differences(method)] for label, method in methods.items()]
    return f":::{{container}} wide-table\n{markdown(['method', 'differs'], [row for row in rows if row[1]])}\n:::"


def overview(_: str = "", docname: str = "") -> str:  # noqa: ARG001 - directives give the page
    """Return the numbers of rows of all tables, with and without a command."""
    rows = []
    for name in published_tables.names():
        table = published_tables.load(name)
        commands = [row_command(table, label) for label in table.methods]
        without = ", ".join(label for label, command in zip(table.methods, commands, strict=True) if command is None)
        setting = "" if table.setting == "paper" else f", {table.setting} setting"
        section = stand_in_section(table)
        cells = [f"{table.data}{setting}", str(len(commands)), str(len(commands) - commands.count(None)), without or "-"]
        rows.append([*cells, section.lower() if section else "-"])
    header = ["table", "rows", "rows with a command", "rows without a method here", "section of the results"]
    return markdown(header, rows, right=(1, 2))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives ``published-overview``, ``published-table`` and ``published-rules``."""
    add_directive(app, "published-overview", overview)
    add_directive(app, "published-table", published_table)
    add_directive(app, "published-rules", rules_table)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
