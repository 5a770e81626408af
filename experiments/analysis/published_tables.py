"""Published tables: what the papers print, with its source and its known mistakes, to be shown beside one's own runs.

Each file holds one table as printed; what is wrong there, or disagrees with itself, says so. Metrics have the names of the
experiment and the unit of the table: `Table.in_experiment_units` has them as a run would report them. Never compare them with
runs on other data, which `Table.comparable` tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from balance.messages import unknown
from balance.metrics import delta_m, mean_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

PROBLEMS = Path(__file__).resolve().parents[1] / "problems"

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

    def times(self, factor: float) -> Printed:
        """The number in another unit."""
        value, error = (None if number is None else round(number * factor, 12) for number in (self.value, self.error))
        assert value is not None
        return Printed(value, self.digit * factor, error)


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
    data: str  # the data set
    setting: str
    conditions: str  # how the numbers were measured, in sentences
    elsewhere: dict[str, str]  # settings of a run of the experiment on other data
    as_published: dict[str, str]  # settings of a run as in the papers, where the experiment has such settings
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

    def in_experiment_units(self, row: Row) -> dict[str, Printed]:
        """Metrics of a row as a run of the experiment would report them; empty where only delta_m is printed."""
        return {name: printed.times(self.factors[name]) for name, printed in row.metrics.items()}

    def comparable(self, settings: Mapping[str, str]) -> bool:
        """Whether a run with these settings is on the data of the table; not if they do not tell."""
        return any(settings.get(key, other) != other for key, other in self.elsewhere.items())

    def differences(self, settings: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Settings of a run that are not those of the papers: what they are, and what the papers have."""
        return {
            key: (settings[key], theirs) for key, theirs in self.as_published.items() if settings.get(key, theirs) != theirs
        }

    def delta_m(self, method: str) -> float | None:
        """Recomputed from the printed metrics of a method; None where there are none."""
        row = self.methods[method]
        values = {name: printed.value for name, printed in row.metrics.items()}
        return delta_m(values, self.baselines, self.higher_is_better) if values else None

    def mean_ranks(self, ranking: Ranking) -> dict[str, float]:
        """Recomputed from the printed metrics of the methods of a ranking; empty where those are not printed."""
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

    def interval(self, printed: Printed, source: str) -> tuple[float, float]:
        """Where the number was before it was rounded, or cut off towards zero."""
        if source not in self.truncated:
            return printed.value - printed.digit / 2, printed.value + printed.digit / 2
        sign = -1 if printed.value < 0 else 1
        low, high = sorted((printed.value, printed.value + sign * printed.digit))
        return low, high


def _files() -> dict[str, Path]:
    """Return the files by name: the problem's name, and the rest of the file's name where a problem has several."""
    return {f"{file.parent.name}{file.stem.removeprefix('published')}": file for file in PROBLEMS.glob("*/published*.yaml")}


def names() -> tuple[str, ...]:
    """Names of the tables."""
    return tuple(sorted(_files()))


def experiments() -> tuple[str, ...]:
    """Names of the experiments of which there are tables."""
    return tuple(sorted({load(name).experiment for name in names()}))


def of(experiment: str) -> tuple[Table, ...]:
    """All tables of an experiment.

    Raises:
        ValueError: If there is none.
    """
    found = tuple(table for table in map(load, names()) if table.experiment == experiment)
    if not found:
        raise ValueError(f"No published results of '{experiment}' are kept here. There are some of {', '.join(experiments())}.")
    return found


def load(name: str) -> Table:
    """The table called ``name``: that of an experiment, and where there are several, one of its other settings.

    Raises:
        ValueError: If there is none, or its file is not such a table.
    """
    if name not in names():
        raise ValueError(unknown("published table", name, names()))
    return read_file(_files()[name])


def read_file(file: Path) -> Table:
    """The table in a file. All scalars are read as text, since 0.20 has two digits.

    Raises:
        ValueError: If it is not such a table.
    """
    try:
        content: Any = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 (it makes text only)
        return _table(content)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} must be a published table like the others in {PROBLEMS}, but: {error!r}") from None


def _table(content: Any) -> Table:
    metrics, sources = content["metrics"], content["sources"]
    for name, metric in metrics.items():
        if metric["better"] not in {"higher", "lower"}:
            raise ValueError(f"better of '{name}' must be higher or lower, but got {metric['better']}")
    methods = {name: _row(name, row, metrics, sources) for name, row in content["methods"].items()}
    return Table(
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
