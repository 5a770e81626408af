"""Published tables: numbers as papers print them, with their source and their known mistakes.

Each file ``problems/<problem>/published*.yaml`` contains one table as printed, with remarks where a number is wrong or
disagrees with others. Metrics have the names of the experiment and the unit of the table; `PublishedTable.in_experiment_units`
converts them to the unit of a recorded run. Recorded runs on other data must never be compared with a table:
`PublishedTable.has_data_of` decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from balance import gradient_balancers, loss_balancers
from balance.messages import unknown
from balance.metrics import delta_m, mean_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

PROBLEMS = Path(__file__).resolve().parents[1] / "problems"


class PrintedNumber(NamedTuple):
    """A printed number: its value, the value of one in its last digit, and its standard error, if any is printed."""

    value: float
    digit: float
    error: float | None = None

    def times(self, factor: float) -> PrintedNumber:
        """Return the number in another unit."""
        value, error = (None if number is None else round(number * factor, 12) for number in (self.value, self.error))
        assert value is not None
        return PrintedNumber(value, self.digit * factor, error)


class PublishedRow(NamedTuple):
    """The numbers that are printed about one method."""

    source: str
    metrics: dict[str, PrintedNumber]  # by name; empty if only delta_m is printed
    delta_m: PrintedNumber | None
    disagrees: str | None  # reason why delta_m does not follow from the metrics
    note: str | None


class PublishedRanking(NamedTuple):
    """Mean ranks, which are valid among these methods only."""

    source: str
    values: dict[str, PrintedNumber]
    first: int  # the best rank
    ranked_as: dict[str, str]  # methods that were ranked with the numbers of another method
    decimals: dict[str, int]  # digits that were ranked, by metric; empty for the digits of the rows
    disagrees: dict[str, str]  # by method: the reason why its mean rank does not follow from the rows


class PublishedTable(NamedTuple):
    """One published table."""

    experiment: str
    data: str  # the data set
    setting: str
    conditions: str  # the measurement, in sentences
    elsewhere: dict[str, str]  # settings of a run of the experiment on other data
    as_published: dict[str, str]  # settings of a run as in the papers, if the experiment has such settings
    sources: dict[str, str]
    truncated: frozenset[str]  # sources that cut digits off instead of rounding
    higher_is_better: frozenset[str]
    factors: dict[str, float]  # printed value x factor = value of the experiment's metric
    single_task: PublishedRow
    methods: dict[str, PublishedRow]
    rankings: tuple[PublishedRanking, ...]

    @property
    def baselines(self) -> dict[str, float]:
        """Single-task value of each metric, as printed."""
        return {name: printed.value for name, printed in self.single_task.metrics.items()}

    def in_experiment_units(self, row: PublishedRow) -> dict[str, PrintedNumber]:
        """Return the metrics of a row in the units of a recorded run; empty if only delta_m is printed."""
        return {name: printed.times(self.factors[name]) for name, printed in row.metrics.items()}

    def has_data_of(self, settings: Mapping[str, str]) -> bool:
        """Return whether a run with these settings has the data of the table; False if the settings do not decide."""
        return any(settings.get(key, other) != other for key, other in self.elsewhere.items())

    def differences(self, settings: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Return the settings that differ from the papers: the given value, and the value of the papers."""
        return {
            key: (settings[key], theirs) for key, theirs in self.as_published.items() if settings.get(key, theirs) != theirs
        }

    def delta_m(self, method: str) -> float | None:
        """Recompute delta_m from the printed metrics of a method; None without metrics."""
        row = self.methods[method]
        values = {name: printed.value for name, printed in row.metrics.items()}
        return delta_m(values, self.baselines, self.higher_is_better) if values else None

    def mean_ranks(self, ranking: PublishedRanking) -> dict[str, float]:
        """Recompute mean ranks from the printed metrics of the ranked methods; empty if some are not printed."""
        rows = {method: self.methods[ranking.ranked_as.get(method, method)].metrics for method in ranking.values}
        if not all(rows.values()):
            return {}
        # 1e-9: a printed 5 is rounded up, which its nearest float may not be
        ranked = {
            method: {
                name: round(printed.value + 1e-9, ranking.decimals[name]) if ranking.decimals else printed.value
                for name, printed in row.items()
            }
            for method, row in rows.items()
        }
        return {method: rank + ranking.first - 1 for method, rank in mean_rank(ranked, self.higher_is_better).items()}

    def interval(self, printed: PrintedNumber, source: str) -> tuple[float, float]:
        """Return the bounds of the number before the source rounded it, or cut it off towards zero."""
        if source not in self.truncated:
            return printed.value - printed.digit / 2, printed.value + printed.digit / 2
        sign = -1 if printed.value < 0 else 1
        low, high = sorted((printed.value, printed.value + sign * printed.digit))
        return low, high


def registered_methods() -> dict[str, tuple[str, str | None]]:
    """Return loss method and gradient method by the name of a method in papers, for registered methods with such a name."""
    methods: dict[str, tuple[str, str | None]] = {}
    methods |= {loss_balancers.traits(name).label: (name, None) for name in loss_balancers.names()}
    methods |= {gradient_balancers.traits(name).label: ("ls", name) for name in gradient_balancers.names()}
    methods.pop("", None)
    return methods


def names() -> tuple[str, ...]:
    """Return the names of the tables."""
    return tuple(sorted(_files()))


def experiments() -> tuple[str, ...]:
    """Return the names of the experiments with tables."""
    return tuple(sorted({load(name).experiment for name in names()}))


def for_experiment(experiment: str) -> tuple[PublishedTable, ...]:
    """Return all tables of an experiment.

    Raises:
        ValueError: If the experiment has no table.
    """
    tables = tuple(table for table in map(load, names()) if table.experiment == experiment)
    if not tables:
        raise ValueError(f"No published results of '{experiment}' are available. Available: {', '.join(experiments())}.")
    return tables


def load(name: str) -> PublishedTable:
    """Return the table called ``name``: the experiment's name, with a suffix if the experiment has several tables.

    Raises:
        ValueError: If no table has that name, or its file has another form.
    """
    if name not in names():
        raise ValueError(unknown("published table", name, names()))
    return read_file(_files()[name])


def _files() -> dict[str, Path]:
    """Return the files by name: the problem's name, and the rest of the file's name where a problem has several."""
    return {f"{file.parent.name}{file.stem.removeprefix('published')}": file for file in PROBLEMS.glob("*/published*.yaml")}


def read_file(file: Path) -> PublishedTable:
    """Read the table in a file. All scalars are read as text, since 0.20 has two digits.

    Returns:
        The table.

    Raises:
        ValueError: If the file has another form.
    """
    try:
        content: Any = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        return _table(content)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} must be a published table like the others in {PROBLEMS}, but: {error!r}") from None


def _table(content: Any) -> PublishedTable:
    metrics, sources = content["metrics"], content["sources"]
    for name, metric in metrics.items():
        if metric["better"] not in {"higher", "lower"}:
            raise ValueError(f"better of '{name}' must be higher or lower, but got {metric['better']}")
    methods = {name: _row(name, row, metrics, sources) for name, row in content["methods"].items()}
    return PublishedTable(
        experiment=content["experiment"],
        data=content["data"],
        setting=content["setting"],
        conditions=content["conditions"].strip(),
        elsewhere=content.get("elsewhere", {}),
        as_published=content.get("as_published", {}),
        sources=sources,
        truncated=frozenset(content.get("truncated", "").split()),
        higher_is_better=frozenset(name for name, metric in metrics.items() if metric["better"] == "higher"),
        factors={name: float(metric.get("factor", 1)) for name, metric in metrics.items()},
        single_task=_row("single_task", content["single_task"], metrics, sources),
        methods=methods,
        rankings=tuple(_ranking(ranking, metrics, methods) for ranking in content.get("mean_ranks", ())),
    )


def _row(name: str, row: Any, metrics: Mapping[str, Any], sources: Mapping[str, str]) -> PublishedRow:
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
    return PublishedRow(row["source"], printed, delta_m, row.get("disagrees"), row.get("note"))


def _printed(value: str, error: str | None = None) -> PrintedNumber:
    return PrintedNumber(float(value), 10.0 ** -len(value.partition(".")[2]), None if error is None else float(error))


def _ranking(ranking: Any, metrics: Mapping[str, Any], methods: Mapping[str, PublishedRow]) -> PublishedRanking:
    for method in ranking["values"]:
        if method not in methods:
            raise ValueError(unknown("ranked method", method, methods))
    disagrees = ranking.get("disagrees", {"methods": "", "reason": ""})
    decimals = ranking.get("decimals", "").split()
    if len(decimals) not in {0, len(metrics)}:
        raise ValueError(f"a ranking must have the decimals of {len(metrics)} metrics, but got {decimals}")
    return PublishedRanking(
        source=ranking["source"],
        values={method: _printed(value) for method, value in ranking["values"].items()},
        first=int(ranking.get("first", 1)),
        ranked_as=ranking.get("ranked_as", {}),
        decimals={name: int(number) for name, number in zip(metrics, decimals, strict=False)},
        disagrees=dict.fromkeys(disagrees["methods"].split(), disagrees["reason"]),
    )
