"""A published table next to recorded runs.

If the runs have the data of the papers, their means appear in the published table, in separate lines. Runs on other data are
left out, and the table states that they cannot be compared. Published methods and runs are never judged against each other,
because the papers print too little for a test.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from balance.comparison.formats import MISSING, Cell, TextTable
from balance.comparison.report import Section
from balance.comparison.statistics import Estimate
from balance.comparison.tables import SINGLE_TASK, direction, remark_on_hidden
from balance.metrics import delta_m
from experiments.analysis.published_tables import registered_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from balance.comparison.run_table import Row, RunTable
    from experiments.analysis.published_tables import PrintedNumber, PublishedRanking, PublishedRow, PublishedTable

LOCAL_PREFIX = "here: "  # begins the label of a line that no paper printed


class PublishedComparison(NamedTuple):
    """A published table, and its relation to recorded runs.

    Attributes:
        table: As published.
        runs: Runs with the data of the table; None without runs, or if they have other data.
        relation: Relation between the runs and the papers, in sentences; empty without runs.
        data: Data of the runs; empty without runs.
    """

    table: PublishedTable
    runs: RunTable | None = None
    relation: str = ""
    data: str = ""

    @property
    def comparable(self) -> bool | None:
        """True if the runs have the data of the table; None without runs."""
        return self.runs is not None if self.relation else None

    @property
    def title(self) -> str:
        """Title, which states that these numbers, or some of them, were not measured here."""
        setting = "" if self.table.setting == "paper" else f", {self.table.setting} setting"
        exception = "" if self.runs is None else f", except for lines with '{LOCAL_PREFIX.strip()}'"
        return f"Published results on {self.table.data}{setting} (not measured here{exception})"


def compare_with_published(table: PublishedTable, compared: RunTable | None) -> PublishedComparison:
    """Return the table together with the runs, if they have its data."""
    if compared is None:
        return PublishedComparison(table)
    settings = [run.settings for row in compared.rows for run in row.runs]
    if not all(map(table.has_data_of, settings)):
        data = ", ".join(f"{key}={settings[0].get(key, 'unknown')}" for key in table.elsewhere)
        relation = f"Not comparable with the runs here, which have other data ({data}) than this table ({table.data})."
        return PublishedComparison(table, None, relation, data)
    different = _different_settings(table, settings)
    remark = f"but with {different}" if different else "and no known setting differs from the papers"
    return PublishedComparison(table, compared, f"The runs here are on {table.data} too, {remark}.", table.data)


def _different_settings(table: PublishedTable, settings: Iterable[Mapping[str, str]]) -> str:
    """Return the settings of runs that differ from the papers, in words."""
    different: dict[tuple[str, str], set[str]] = {}
    for of_run in settings:
        for key, (here, in_papers) in table.differences(of_run).items():
            different.setdefault((key, in_papers), set()).add(here)
    return ", ".join(f"{key}={' or '.join(sorted(here))} (papers: {theirs})" for (key, theirs), here in different.items())


def text_table(published: PublishedComparison, most_metrics: int | None = None) -> TextTable:
    """Return the published table in the units of the experiment, with the runs on its data.

    Columns without any content are left out; so are the metrics, unless most of the methods have them.

    Args:
        published: The table and the runs.
        most_metrics: Largest number of metrics; None for all.
    """
    table = published.table
    printed = sum(bool(row.metrics) for row in table.methods.values())
    names = tuple(table.baselines) if 2 * printed > len(table.methods) else ()
    shown = names[:most_metrics]
    methods, single_task = list(_method_lines(published)), list(_single_task_lines(published))
    columns = _columns(table, [*methods, *single_task], shown)
    columns = {name: texts for name, texts in columns.items() if set(texts[: len(methods)]) != {MISSING}}
    lines = [[Cell(text) for text in line] for line in zip(*columns.values(), strict=True)]
    explanation = legend(published, with_metrics=bool(names)) + remark_on_hidden(len(names) - len(shown))
    return TextTable(list(columns), lines, len(methods), explanation, published.title)


def table_for_latex(published: PublishedComparison) -> TextTable:
    """Return the table with relation and notes in its caption."""
    table = text_table(published)
    return table._replace(legend=" ".join(filter(None, (published.relation, table.legend, *notes(published)))))


def legend(published: PublishedComparison, *, with_metrics: bool = True) -> str:
    """Explain the measurement, the columns and the lines."""
    table = published.table
    sentences = [table.conditions]
    if any(row.delta_m for row in table.methods.values()):
        sentences.append("delta_m: against the single-task networks of the papers.")
    if table.rankings:
        sentences.append("Mean ranks: among the methods of the same column only.")
    if any(row.disagrees for row in table.methods.values()) or any(ranking.disagrees for ranking in table.rankings):
        sentences.append("In parentheses: recomputed from the printed metrics, where rounding does not explain the difference.")
    if not with_metrics:
        some = " and ".join([*(name for name, row in table.methods.items() if row.metrics), SINGLE_TASK])
        sentences.append(f"Metrics are printed for {some} only; the formats csv and json have them.")
    if published.runs is not None:
        sentences.append(
            f"Lines with '{LOCAL_PREFIX.strip()}' are runs: mean ± standard error over seeds; their delta_m is against the "
            "single-task networks of the papers, too."
        )
    return " ".join(sentences)


def section(published: PublishedComparison) -> Section:
    """Return the table as a section of the report."""
    is_comparable = bool(published.comparable)
    return Section(text_table(published), published.relation, is_comparable, notes(published), LOCAL_PREFIX)


def notes(published: PublishedComparison) -> tuple[str, ...]:
    """Return the sources and their known mistakes."""
    table = published.table
    sentences = [f"{key}: {words}." for key, words in table.sources.items()]
    sentences += [f"{name}: {row.note}." for name, row in rows_with_single_task(table) if row.note]
    sentences += [
        f"{name}: the printed delta_m does not follow from the printed metrics; {row.disagrees}."
        for name, row in rows_with_single_task(table)
        if row.disagrees
    ]
    return (*sentences, *(note for ranking in table.rankings for note in _notes_on_ranking(ranking)))


def _notes_on_ranking(ranking: PublishedRanking) -> Iterator[str]:
    head = f"Mean ranks of {ranking.source}"
    if ranking.first != 1:
        yield f"{head} begin at {ranking.first}, not at 1."
    for method, other in ranking.ranked_as.items():
        yield f"{head}: {method} was ranked with the numbers of {other}."
    for reason in dict.fromkeys(ranking.disagrees.values()):
        methods = ", ".join(method for method, why in ranking.disagrees.items() if why == reason)
        yield f"{head}: the ranks of {methods} do not follow from the printed metrics; {reason}."


class _Line(NamedTuple):
    """A line of the table."""

    label: str
    source: str
    delta_m: str
    ranks: list[str]
    metrics: Mapping[str, str]


def _columns(table: PublishedTable, lines: Sequence[_Line], metrics: Sequence[str]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {"method": [line.label for line in lines]}
    columns["source"] = [line.source for line in lines]
    columns["delta_m % ↓"] = [line.delta_m for line in lines]
    for k, ranking in enumerate(table.rankings):
        columns[f"mean rank ↓ {ranking.source}"] = [line.ranks[k] for line in lines]
    for name in metrics:
        header = f"{name} {direction(name, table.higher_is_better)}"
        columns[header] = [line.metrics.get(name, MISSING) for line in lines]
    return columns


def _method_lines(published: PublishedComparison) -> Iterator[_Line]:
    """Yield the published methods, each followed by the runs with its methods; then the other runs."""
    table, local = published.table, list(published.runs.rows) if published.runs else []
    methods = registered_methods()
    for name, row in table.methods.items():
        ranks = [_rank(table, ranking, name) for ranking in table.rankings]
        yield _Line(name, row.source, _delta_m(table, name), ranks, _published_texts(table, row))
        same = [mine for mine in local if (mine.loss_method, mine.gradient_method) == methods.get(name)]
        yield from (_local_line(table, mine) for mine in same)
        local = [mine for mine in local if mine not in same]
    yield from (_local_line(table, mine) for mine in local)


def _single_task_lines(published: PublishedComparison) -> Iterator[_Line]:
    table = published.table
    blank = [""] * len(table.rankings)
    yield _Line(SINGLE_TASK, table.single_task.source, "", blank, _published_texts(table, table.single_task))
    if published.runs is not None and published.runs.baselines:
        estimates = {name: Estimate({0: value}) for name, value in published.runs.baselines.items()}
        yield _Line(f"{LOCAL_PREFIX}{SINGLE_TASK}", "as above", "", blank, _local_texts(table, estimates))


def _local_line(table: PublishedTable, row: Row) -> _Line:
    seeds = f"{len(row.runs)} seed{'s' if len(row.runs) != 1 else ''}"
    drops = against_published(table, row)
    digits = min((printed.delta_m.digit for printed in table.methods.values() if printed.delta_m), default=0.01)
    ranks = [MISSING] * len(table.rankings)
    return _Line(f"{LOCAL_PREFIX}{row.label}", seeds, _estimate(drops, digits), ranks, _local_texts(table, row.metrics))


def against_published(table: PublishedTable, row: Row) -> Estimate:
    """Return delta_m of runs on the data of the table against its single-task networks, by seed."""
    baselines = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    return Estimate(
        {
            run.seed: delta_m({name: run.metrics.get(name, math.nan) for name in baselines}, baselines, table.higher_is_better)
            for run in row.runs
        }
    )


def _published_texts(table: PublishedTable, row: PublishedRow) -> dict[str, str]:
    return {name: _text(printed) for name, printed in table.in_experiment_units(row).items()}


def _local_texts(table: PublishedTable, metrics: Mapping[str, Estimate]) -> dict[str, str]:
    """Return the metrics of runs, rounded to the largest number of digits in the papers."""
    rows = [table.in_experiment_units(row) for _, row in rows_with_single_task(table)]
    digits = {name: min(row[name].digit for row in rows if row) for name in table.baselines}
    return {name: _estimate(metrics[name], digit) for name, digit in digits.items() if name in metrics}


def rows_with_single_task(table: PublishedTable) -> list[tuple[str, PublishedRow]]:
    """Return names and rows of the methods, and of the single-task networks last."""
    return [*table.methods.items(), (SINGLE_TASK, table.single_task)]


def _text(printed: PrintedNumber) -> str:
    error = "" if printed.error is None else f" ± {_rounded(printed.error, printed.digit)}"
    return _rounded(printed.value, printed.digit) + error


def _estimate(estimate: Estimate, digit: float) -> str:
    if not math.isfinite(estimate.mean):
        return str(estimate.mean)
    error = f" ± {_rounded(estimate.error, digit)}" if math.isfinite(estimate.error) else ""
    return _rounded(estimate.mean, digit) + error


def _rounded(number: float, digit: float) -> str:
    decimals = max(round(-math.log10(digit)), 0)
    return f"{round(number, decimals) + 0.0:.{decimals}f}"  # no "-0.0"


def _delta_m(table: PublishedTable, method: str) -> str:
    row, recomputed = table.methods[method], table.delta_m(method)
    if row.delta_m is None:
        return MISSING
    remark = f" ({_rounded(recomputed, row.delta_m.digit)})" if row.disagrees and recomputed is not None else ""
    return _text(row.delta_m) + remark


def _rank(table: PublishedTable, ranking: PublishedRanking, method: str) -> str:
    if method not in ranking.values:
        return MISSING
    printed = ranking.values[method]
    remark = f" ({_rounded(table.mean_ranks(ranking)[method], printed.digit)})" if method in ranking.disagrees else ""
    return _text(printed) + remark
