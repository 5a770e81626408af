"""Published tables and recorded runs in one CSV text or one JSON text, with all digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from balance.comparison.tables import (
    COLUMNS,
    csv_lines,
    csv_text,
    json_content,
    json_text,
    summary,
    summary_with_values,
)
from experiments.analysis.published_comparison import against_published, rows_with_single_task
from experiments.analysis.published_tables import registered_methods

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from balance.comparison.run_table import Row, RunTable
    from experiments.analysis.published_comparison import PublishedComparison
    from experiments.analysis.published_tables import PrintedNumber, PublishedRanking, PublishedRow, PublishedTable

ORIGIN = ("data", "setting", "source")  # columns of CSV that distinguish published numbers from runs


def as_csv(compared: RunTable | None, tables: Sequence[PublishedComparison]) -> str:
    """Return runs and published tables as CSV, with the columns ``data``, ``setting`` and ``source``."""
    data = ", ".join(dict.fromkeys(published.data for published in tables))
    lines = [line | {"data": data} for line in csv_lines(compared)] if compared is not None else []
    for published in tables:
        origin = {"data": published.table.data, "setting": published.table.setting}
        lines += [origin | line for line in _published_csv_lines(published.table)]
        lines += [origin | _csv_line_against_published(published.table, row) for row in _local_rows(published)]
    return csv_text(lines, (*COLUMNS, *ORIGIN))


def as_json(experiment: str, compared: RunTable | None, tables: Sequence[PublishedComparison]) -> str:
    """Return runs, under the keys that they have without published tables, and the tables under the key ``published``."""
    runs = {"experiment": experiment, "rows": []} if compared is None else json_content(compared)
    return json_text({**runs, "published": [_json_table(published) for published in tables]})


def _local_rows(published: PublishedComparison) -> Sequence[Row]:
    return published.runs.rows if published.runs else ()


def _published_csv_lines(table: PublishedTable) -> Iterator[dict[str, Any]]:
    for name, row in rows_with_single_task(table):
        line = {"method": name, **_methods(name), "source": table.sources[row.source]}
        quantities = table.in_experiment_units(row) | ({"delta_m": row.delta_m} if row.delta_m else {})
        for quantity, printed in quantities.items():
            yield line | {"quantity": quantity, "mean": printed.value, "standard_error": printed.error}
        recomputed = table.delta_m(name) if row is not table.single_task else None
        if recomputed is not None:
            yield line | {"quantity": "delta_m_recomputed", "mean": recomputed}
        for ranking in table.rankings:
            yield from _ranking_csv_lines(table, ranking, name, line)


def _ranking_csv_lines(
    table: PublishedTable, ranking: PublishedRanking, name: str, line: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    if name not in ranking.values:
        return
    ranked = line | {"source": table.sources[ranking.source]}
    yield ranked | {"quantity": "mean_rank", "mean": ranking.values[name].value}
    if recomputed := table.mean_ranks(ranking):
        yield ranked | {"quantity": "mean_rank_recomputed", "mean": recomputed[name]}


def _csv_line_against_published(table: PublishedTable, row: Row) -> dict[str, Any]:
    line = {"method": row.label, "loss_method": row.loss_method, "gradient_method": row.gradient_method}
    return line | {"quantity": "delta_m_against_published"} | summary(against_published(table, row)) | {"verdict": ""}


def _json_table(published: PublishedComparison) -> dict[str, Any]:
    table = published.table
    return {
        "data": table.data,
        "setting": table.setting,
        "conditions": table.conditions,
        "sources": table.sources,
        "comparable_with_rows": published.comparable,
        "relation": published.relation,
        "metrics": [{"name": name, "higher_is_better": name in table.higher_is_better} for name in table.baselines],
        "methods": [_json_method(table, name, row) for name, row in table.methods.items()],
        "single_task": _json_row(table, table.single_task),
        "mean_ranks": [_json_ranking(table, ranking) for ranking in table.rankings],
        "delta_m_of_rows": {row.label: _json_delta_m(table, row) for row in _local_rows(published)},
    }


def _json_method(table: PublishedTable, name: str, row: PublishedRow) -> dict[str, Any]:
    delta_m = None
    if row.delta_m:
        delta_m = {**_json_number(row.delta_m), "recomputed": table.delta_m(name), "disagrees": row.disagrees}
    return {"method": name, **_methods(name), **_json_row(table, row), "delta_m": delta_m}


def _json_row(table: PublishedTable, row: PublishedRow) -> dict[str, Any]:
    metrics = {name: _json_number(printed) for name, printed in table.in_experiment_units(row).items()}
    return {"source": row.source, "metrics": metrics, "note": row.note}


def _json_ranking(table: PublishedTable, ranking: PublishedRanking) -> dict[str, Any]:
    recomputed = table.mean_ranks(ranking)
    values = {
        name: {"value": printed.value, "recomputed": recomputed.get(name), "disagrees": ranking.disagrees.get(name)}
        for name, printed in ranking.values.items()
    }
    return {"source": ranking.source, "first": ranking.first, "ranked_as": ranking.ranked_as, "values": values}


def _json_delta_m(table: PublishedTable, row: Row) -> dict[str, Any]:
    return {key: value for key, value in summary_with_values(against_published(table, row)).items() if key != "verdict"}


def _json_number(printed: PrintedNumber) -> dict[str, float | None]:
    return {"value": printed.value, "standard_error": printed.error}


def _methods(name: str) -> dict[str, str | None]:
    """Return loss and gradient method of a published method; None where it is not registered here."""
    loss, gradient = registered_methods().get(name, (None, None))
    return {"loss_method": loss, "gradient_method": gradient}
