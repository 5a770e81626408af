"""A published table beside recorded runs -> table, lines of CSV, content of JSON.

Where the runs are on the data of the papers, their means stand in the published table, in lines of their own. Runs on other
data stay out of it, and it says that they cannot be compared. Neither is ever judged against the other: the papers print too
little for that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from balance.metrics import delta_m
from experiments.analysis.comparison import Estimate
from experiments.analysis.formats import MISSING, Cell, Sheet
from experiments.analysis.published_tables import METHODS
from experiments.analysis.tables import (
    COLUMNS,
    SINGLE_TASK,
    csv_lines,
    csv_text,
    further,
    json_content,
    json_text,
    summary,
    with_values,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from experiments.analysis.comparison import Comparison, Row
    from experiments.analysis.published_tables import Printed, Ranking, Table
    from experiments.analysis.published_tables import Row as PublishedRow

HERE = "here: "  # begins the label of a line that no paper printed
ORIGIN = ("data", "setting", "source")  # further columns of CSV


class Beside(NamedTuple):
    """A published table, and what can be said of recorded runs beside it.

    Attributes:
        table: As published.
        runs: Those that may stand in it; None if there are none, or they are on other data.
        relation: How the runs are related to the papers, in sentences; empty without runs.
        data: What the runs are on; empty without runs.
    """

    table: Table
    runs: Comparison | None = None
    relation: str = ""
    data: str = ""

    @property
    def comparable(self) -> bool | None:
        """Whether the runs are on the data of the table; None without runs."""
        return self.runs is not None if self.relation else None

    @property
    def title(self) -> str:
        """Says that this was not measured here, or which part of it."""
        setting = "" if self.table.setting == "paper" else f", {self.table.setting} setting"
        measured = "not measured here" if self.runs is None else f"not measured here, but for lines with '{HERE.strip()}'"
        return f"Published results on {self.table.data}{setting} ({measured})"


def beside(table: Table, compared: Comparison | None) -> Beside:
    """The table, and the runs where they are on the same data."""
    if compared is None:
        return Beside(table)
    settings = [run.settings for row in compared.rows for run in row.runs]
    if not all(table.comparable(of_run) for of_run in settings):
        data = ", ".join(f"{key}={settings[0].get(key, 'unknown')}" for key in table.elsewhere)
        relation = f"Not comparable with the runs here: those are on other data ({data}), these on {table.data}."
        return Beside(table, None, relation, data)
    found: dict[tuple[str, str], set[str]] = {}
    for of_run in settings:
        for key, (ours, theirs) in table.differences(of_run).items():
            found.setdefault((key, theirs), set()).add(ours)
    unlike = ", ".join(f"{key}={' or '.join(sorted(ours))} (papers: {theirs})" for (key, theirs), ours in found.items())
    told = f"but with {unlike}" if unlike else "and no setting is known in which they differ from the papers"
    return Beside(table, compared, f"The runs here are on {table.data} too, {told}.", table.data)


def sheet(of: Beside, most_metrics: int | None = None) -> Sheet:
    """The published table in the units of the experiment, with the runs that may stand in it.

    Columns that no method has anything in are left out; so are the metrics, unless most of the methods have them.

    Args:
        of: The table and the runs.
        most_metrics: How many metrics there is room for; None for all.
    """
    table = of.table
    printed = sum(bool(row.metrics) for row in table.methods.values())
    names = tuple(table.baselines) if 2 * printed > len(table.methods) else ()
    shown = names[:most_metrics]
    methods, alone = list(_methods(of)), list(_single_task(of))
    entries = [*methods, *alone]
    columns: dict[str, list[str]] = {"method": [entry.label for entry in entries]}
    columns["source"] = [entry.source for entry in entries]
    columns["delta_m % ↓"] = [entry.delta_m for entry in entries]
    for k, ranking in enumerate(table.rankings):
        columns[f"mean rank ↓ {ranking.source}"] = [entry.ranks[k] for entry in entries]
    for name in shown:
        columns[f"{name} {'↑' if name in table.higher_is_better else '↓'}"] = [
            entry.metrics.get(name, MISSING) for entry in entries
        ]
    columns = {name: texts for name, texts in columns.items() if set(texts[: len(methods)]) != {MISSING}}
    lines = [[Cell(text) for text in line] for line in zip(*columns.values(), strict=True)]
    told = legend(of, with_metrics=bool(names)) + further(len(names) - len(shown))
    return Sheet(list(columns), lines, len(methods), told, of.title)


def for_latex(of: Beside) -> Sheet:
    """With all that has to be known in the caption."""
    made = sheet(of)
    return made._replace(legend=" ".join(filter(None, (of.relation, made.legend, *notes(of)))))


def legend(of: Beside, *, with_metrics: bool = True) -> str:
    """How the numbers were measured, and what the columns and lines mean."""
    table = of.table
    sentences = [table.conditions]
    if any(row.delta_m for row in table.methods.values()):
        sentences.append("delta_m: against the single-task networks of the papers.")
    if table.rankings:
        sentences.append("Mean ranks: among the methods of their own column only.")
    if any(row.disagrees for row in table.methods.values()) or any(ranking.disagrees for ranking in table.rankings):
        sentences.append("In parentheses: recomputed from the printed metrics, where rounding does not explain the difference.")
    if not with_metrics:
        some = " and ".join([*(name for name, row in table.methods.items() if row.metrics), SINGLE_TASK])
        sentences.append(f"Metrics are printed for {some} only; the formats csv and json have them.")
    if of.runs is not None:
        sentences.append(
            f"Lines with '{HERE.strip()}' are runs: mean ± standard error over seeds; their delta_m is against the same "
            "single-task networks of the papers."
        )
    return " ".join(sentences)


def notes(of: Beside) -> tuple[str, ...]:
    """Sources, and what is known to be wrong in them."""
    table = of.table
    told = [f"{key}: {words}." for key, words in table.sources.items()]
    told += [f"{name}: {row.note}." for name, row in _rows(table) if row.note]
    told += [
        f"{name}: delta_m is not that of the printed metrics; {row.disagrees}." for name, row in _rows(table) if row.disagrees
    ]
    for ranking in table.rankings:
        head = f"Mean ranks of {ranking.source}"
        if ranking.first != 1:
            told.append(f"{head} begin at {ranking.first}, not at 1.")
        told += [f"{head}: {method} was ranked with the numbers of {other}." for method, other in ranking.ranked_as.items()]
        for reason in dict.fromkeys(ranking.disagrees.values()):
            methods = ", ".join(method for method, why in ranking.disagrees.items() if why == reason)
            told.append(f"{head}: those of {methods} are not those of the printed metrics; {reason}.")
    return tuple(told)


def in_one_csv(compared: Comparison | None, tables: Sequence[Beside]) -> str:
    """Runs and published tables; the columns ``data``, ``setting`` and ``source`` tell them apart."""
    on = ", ".join(dict.fromkeys(of.data for of in tables))
    lines = [line | {"data": on} for line in csv_lines(compared)] if compared is not None else []
    for of in tables:
        origin = {"data": of.table.data, "setting": of.table.setting}
        lines += [origin | line for line in _csv_lines(of)]
    return csv_text(lines, (*COLUMNS, *ORIGIN))


def in_one_json(experiment: str, compared: Comparison | None, tables: Sequence[Beside]) -> str:
    """Runs, under the keys that they have without published tables, and these under the key ``published``."""
    runs = {"experiment": experiment, "rows": []} if compared is None else json_content(compared)
    return json_text({**runs, "published": [_json_content(of) for of in tables]})


class _Entry(NamedTuple):
    """A line of the table."""

    label: str
    source: str
    delta_m: str
    ranks: list[str]
    metrics: Mapping[str, str]


def _methods(of: Beside) -> Iterator[_Entry]:
    """Published methods, each followed by the runs of the same; then the other runs."""
    table, local = of.table, list(of.runs.rows) if of.runs else []
    for name, row in table.methods.items():
        ranks = [_rank(table, ranking, name) for ranking in table.rankings]
        yield _Entry(name, row.source, _delta_m(table, name), ranks, _texts(table, row))
        same = [mine for mine in local if (mine.loss_method, mine.gradient_method) == METHODS.get(name)]
        yield from (_of_run(table, mine) for mine in same)
        local = [mine for mine in local if mine not in same]
    yield from (_of_run(table, mine) for mine in local)


def _single_task(of: Beside) -> Iterator[_Entry]:
    table = of.table
    blank = [""] * len(table.rankings)
    yield _Entry(SINGLE_TASK, table.single_task.source, "", blank, _texts(table, table.single_task))
    if of.runs is not None and of.runs.baselines:
        known = {name: Estimate({0: value}) for name, value in of.runs.baselines.items()}
        texts = _texts_of(table, known)
        yield _Entry(f"{HERE}{SINGLE_TASK}", "as above", "", blank, texts)


def _of_run(table: Table, row: Row) -> _Entry:
    seeds = f"{len(row.runs)} seed{'s' if len(row.runs) != 1 else ''}"
    drops = against_published(table, row)
    digits = min((printed.delta_m.digit for printed in table.methods.values() if printed.delta_m), default=0.01)
    ranks = [MISSING] * len(table.rankings)
    return _Entry(f"{HERE}{row.label}", seeds, _estimate(drops, digits), ranks, _texts_of(table, row.metrics))


def against_published(table: Table, row: Row) -> Estimate:
    """delta_m of runs on the data of the table, by seed, against its single-task networks."""
    baselines = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    return Estimate(
        {
            run.seed: delta_m({name: run.metrics.get(name, math.nan) for name in baselines}, baselines, table.higher_is_better)
            for run in row.runs
        }
    )


def _texts(table: Table, row: PublishedRow) -> dict[str, str]:
    return {name: _text(printed) for name, printed in table.in_experiment_units(row).items()}


def _texts_of(table: Table, metrics: Mapping[str, Estimate]) -> dict[str, str]:
    """Of runs, with the digits that the papers have at most."""
    rows = [table.in_experiment_units(row) for _, row in _rows(table)]
    digits = {name: min(row[name].digit for row in rows if row) for name in table.baselines}
    return {name: _estimate(metrics[name], digit) for name, digit in digits.items() if name in metrics}


def _rows(table: Table) -> list[tuple[str, PublishedRow]]:
    return [*table.methods.items(), (SINGLE_TASK, table.single_task)]


def _text(printed: Printed) -> str:
    return _rounded(printed.value, printed.digit) + (
        "" if printed.error is None else f" ± {_rounded(printed.error, printed.digit)}"
    )


def _estimate(estimate: Estimate, digit: float) -> str:
    if not math.isfinite(estimate.mean):
        return str(estimate.mean)
    error = f" ± {_rounded(estimate.error, digit)}" if math.isfinite(estimate.error) else ""
    return _rounded(estimate.mean, digit) + error


def _rounded(number: float, digit: float) -> str:
    decimals = max(round(-math.log10(digit)), 0)
    return f"{round(number, decimals) + 0.0:.{decimals}f}"  # no "-0.0"


def _delta_m(table: Table, method: str) -> str:
    row, again = table.methods[method], table.delta_m(method)
    if row.delta_m is None:
        return MISSING
    return _text(row.delta_m) + (f" ({_rounded(again, row.delta_m.digit)})" if row.disagrees and again is not None else "")


def _rank(table: Table, ranking: Ranking, method: str) -> str:
    if method not in ranking.values:
        return MISSING
    printed = ranking.values[method]
    again = f" ({_rounded(table.mean_ranks(ranking)[method], printed.digit)})" if method in ranking.disagrees else ""
    return _text(printed) + again


def _csv_lines(of: Beside) -> Iterator[dict[str, Any]]:
    table = of.table
    for name, row in _rows(table):
        loss, gradient = METHODS.get(name, (None, None))
        line = {"method": name, "loss_method": loss, "gradient_method": gradient, "source": table.sources[row.source]}
        quantities = table.in_experiment_units(row) | ({"delta_m": row.delta_m} if row.delta_m else {})
        for quantity, printed in quantities.items():
            yield line | {"quantity": quantity, "mean": printed.value, "standard_error": printed.error}
        again = table.delta_m(name) if row is not table.single_task else None
        if again is not None:
            yield line | {"quantity": "delta_m_recomputed", "mean": again}
        for ranking in (ranking for ranking in table.rankings if name in ranking.values):
            ranked = line | {"source": table.sources[ranking.source]}
            yield ranked | {"quantity": "mean_rank", "mean": ranking.values[name].value}
            if ranks := table.mean_ranks(ranking):
                yield ranked | {"quantity": "mean_rank_recomputed", "mean": ranks[name]}
    for mine in of.runs.rows if of.runs else ():
        line = {"method": mine.label, "loss_method": mine.loss_method, "gradient_method": mine.gradient_method}
        yield line | {"quantity": "delta_m_against_published"} | summary(against_published(table, mine)) | {"verdict": ""}


def _json_content(of: Beside) -> dict[str, Any]:
    table = of.table
    return {
        "data": table.data,
        "setting": table.setting,
        "conditions": table.conditions,
        "sources": table.sources,
        "comparable_with_rows": of.comparable,
        "relation": of.relation,
        "metrics": [{"name": name, "higher_is_better": name in table.higher_is_better} for name in table.baselines],
        "methods": [
            {
                "method": name,
                **dict(zip(("loss_method", "gradient_method"), METHODS.get(name, (None, None)), strict=True)),
                **_json_row(table, row),
                "delta_m": row.delta_m
                and {**_json_number(row.delta_m), "recomputed": table.delta_m(name), "disagrees": row.disagrees},
            }
            for name, row in table.methods.items()
        ],
        "single_task": _json_row(table, table.single_task),
        "mean_ranks": [
            {
                "source": ranking.source,
                "first": ranking.first,
                "ranked_as": ranking.ranked_as,
                "values": {
                    name: {
                        "value": printed.value,
                        "recomputed": table.mean_ranks(ranking).get(name),
                        "disagrees": ranking.disagrees.get(name),
                    }
                    for name, printed in ranking.values.items()
                },
            }
            for ranking in table.rankings
        ],
        "delta_m_of_rows": {row.label: _of_rows(table, row) for row in of.runs.rows} if of.runs else {},
    }


def _of_rows(table: Table, row: Row) -> dict[str, Any]:
    return {key: value for key, value in with_values(against_published(table, row)).items() if key != "verdict"}


def _json_row(table: Table, row: PublishedRow) -> dict[str, Any]:
    metrics = {name: _json_number(printed) for name, printed in table.in_experiment_units(row).items()}
    return {"source": row.source, "metrics": metrics, "note": row.note}


def _json_number(printed: Printed) -> dict[str, float | None]:
    return {"value": printed.value, "standard_error": printed.error}
