"""Published tables: what the papers print, with its source and its known mistakes, to be shown beside one's own runs.

Each file holds one table as printed; what is wrong there, or disagrees with itself, says so. Values are in the unit of the
table: `Table.in_experiment_units` makes them comparable with the metrics of a run. Never put them beside runs on other data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from balance.registry import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path(__file__).resolve().parent

# Names of methods in the tables -> loss_method and gradient_method here
METHODS: Mapping[str, tuple[str, str | None]] = {
    "LS": ("ls", None),
    "SI": ("scaleinvls", None),
    "RLW": ("rlw", None),
    "DWA": ("dwa", None),
    "UW": ("uw", None),
    "FAMO": ("famo", None),
    "GO4Align": ("go4align", None),
    "MGDA": ("ls", "mgda"),
    "PCGrad": ("ls", "pcgrad"),
    "GradDrop": ("ls", "graddrop"),
    "CAGrad": ("ls", "cagrad"),
    "IMTL-G": ("ls", "imtl"),
    "Nash-MTL": ("ls", "nashmtl"),
}


class Printed(NamedTuple):
    """A number as it is printed: its value, what one in its last digit is worth, and its standard error if it has one."""

    value: float
    digit: float
    error: float | None = None


class Row(NamedTuple):
    """What is printed about one method."""

    source: str
    metrics: dict[str, Printed]  # by name; empty where only delta_m is printed
    delta_m: Printed | None
    disagrees: str | None  # why delta_m is not that of the metrics
    note: str | None


class Ranking(NamedTuple):
    """Mean ranks, which mean something among these methods only."""

    source: str
    values: dict[str, Printed]
    first: int  # the best rank
    ranked_as: dict[str, str]  # methods that were ranked with the numbers of another
    decimals: dict[str, int]  # digits that were ranked, by metric; empty for those of the rows
    disagrees: dict[str, str]  # method -> why its mean rank is not that of the rows


class Table(NamedTuple):
    """One published table."""

    experiment: str
    setting: str
    sources: dict[str, str]
    truncated: frozenset[str]  # sources that cut digits off instead of rounding
    higher_is_better: frozenset[str]
    factors: dict[str, float]  # printed value x factor = value of the experiment's metric
    single_task: Row
    methods: dict[str, Row]
    rankings: tuple[Ranking, ...]

    @property
    def baselines(self) -> dict[str, float]:
        """Single-task value of each metric, as printed."""
        return {name: printed.value for name, printed in self.single_task.metrics.items()}

    def in_experiment_units(self, method: str) -> dict[str, float]:
        """Metrics of a method as a run of the experiment would report them; empty where only delta_m is printed."""
        return {name: self.factors[name] * printed.value for name, printed in self.methods[method].metrics.items()}

    def interval(self, printed: Printed, source: str) -> tuple[float, float]:
        """Where the number was before it was rounded, or cut off towards zero."""
        if source not in self.truncated:
            return printed.value - printed.digit / 2, printed.value + printed.digit / 2
        sign = -1 if printed.value < 0 else 1
        low, high = sorted((printed.value, printed.value + sign * printed.digit))
        return low, high


def names() -> tuple[str, ...]:
    """Names of the tables."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def load(name: str) -> Table:
    """The table called ``name``: that of an experiment, and where there are several, one of its other settings.

    Raises:
        ValueError: If there is none, or its file is not such a table.
    """
    if name not in names():
        raise ValueError(unknown("published table", name, names()))
    return read_file(FOLDER / f"{name}.yaml")


def read_file(file: Path) -> Table:
    """The table in a file. All scalars are read as text, since 0.20 has two digits.

    Raises:
        ValueError: If it is not such a table.
    """
    try:
        content: Any = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 (it makes text only)
        return _table(content)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} must be a published table like the others in {FOLDER}, but: {error!r}") from None


def _table(content: Any) -> Table:
    metrics, sources = content["metrics"], content["sources"]
    for name, metric in metrics.items():
        if metric["better"] not in {"higher", "lower"}:
            raise ValueError(f"better of '{name}' must be higher or lower, but got {metric['better']}")
    methods = {name: _row(name, row, metrics, sources) for name, row in content["methods"].items()}
    return Table(
        experiment=content["experiment"],
        setting=content["setting"],
        sources=sources,
        truncated=frozenset(content.get("truncated", "").split()),
        higher_is_better=frozenset(name for name, metric in metrics.items() if metric["better"] == "higher"),
        factors={name: float(metric.get("factor", 1)) for name, metric in metrics.items()},
        single_task=_row("single_task", content["single_task"], metrics, sources),
        methods=methods,
        rankings=tuple(_ranking(ranking, metrics, methods) for ranking in content.get("mean_ranks", ())),
    )


def _row(name: str, row: Any, metrics: Mapping[str, Any], sources: Mapping[str, str]) -> Row:
    values, errors = row.get("values", "").split(), row.get("errors", "").split()
    if len(values) not in {0, len(metrics)} or len(errors) not in {0, len(values)}:
        raise ValueError(f"'{name}' must have {len(metrics)} values, and as many errors or none, but got {values}, {errors}")
    if row["source"] not in sources:
        raise ValueError(unknown(f"source of '{name}'", row["source"], sources))
    printed = {
        metric: _printed(value, errors[k] if errors else None)
        for k, (metric, value) in enumerate(zip(metrics, values, strict=False))
    }
    delta_m = _printed(*row["delta_m"].split(" +- ")) if "delta_m" in row else None
    return Row(row["source"], printed, delta_m, row.get("disagrees"), row.get("note"))


def _printed(value: str, error: str | None = None) -> Printed:
    return Printed(float(value), 10.0 ** -len(value.partition(".")[2]), None if error is None else float(error))


def _ranking(ranking: Any, metrics: Mapping[str, Any], methods: Mapping[str, Row]) -> Ranking:
    for method in ranking["values"]:
        if method not in methods:
            raise ValueError(unknown("ranked method", method, methods))
    disagrees = ranking.get("disagrees", {"methods": "", "reason": ""})
    decimals = ranking.get("decimals", "").split()
    if len(decimals) not in {0, len(metrics)}:
        raise ValueError(f"a ranking must have the decimals of {len(metrics)} metrics, but got {decimals}")
    return Ranking(
        source=ranking["source"],
        values={method: _printed(value) for method, value in ranking["values"].items()},
        first=int(ranking.get("first", 1)),
        ranked_as=ranking.get("ranked_as", {}),
        decimals={name: int(number) for name, number in zip(metrics, decimals, strict=False)},
        disagrees=dict.fromkeys(disagrees["methods"].split(), disagrees["reason"]),
    )
