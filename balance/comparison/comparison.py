"""Comparison of the runs of an experiment that `balance.tracking.Tracker` has recorded, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..messages import unknown
from ..tracking.description import baseline
from . import report, report_files
from .declared import (
    check_metrics,
    declared_baselines,
    directions,
    recorded_baselines,
    remark_on_missing_baselines,
)
from .run_table import tabulate
from .selection import select_runs
from .single_task import Baselines
from .store import Store
from .tables import plain_text, render

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Sequence

    from .recorded_run import RecordedRun
    from .run_table import RunTable


@dataclass(frozen=True, repr=False)
class Comparison:
    """Compared runs of an experiment. ``print(comparison)`` shows the table.

    Attributes:
        table: Rows with means over seeds, standard errors, verdicts and mean ranks; best first.
        store: Store of the runs.
        folder: Folder for the report, unless another one is given.
    """

    table: RunTable
    store: Store
    folder: Path

    def __str__(self) -> str:
        return plain_text(self.table)

    def __repr__(self) -> str:
        rows = ", ".join(row.label for row in self.table.rows)
        return f"Comparison({self.table.experiment!r}, rows: {rows})"

    def _repr_markdown_(self) -> str:
        """Return the table for notebooks."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return the table and its notes in Markdown."""
        notes = "".join(f"- {note}\n" for note in self.table.notes)
        return "\n".join(filter(None, (render(self.table, "markdown"), notes)))

    def to_latex(self) -> str:
        """Return the table as a ``table`` for the LaTeX package booktabs."""
        return render(self.table, "latex")

    def to_csv(self) -> str:
        """Return all numbers, with all digits, one line for each method and quantity."""
        return render(self.table, "csv")

    def to_json(self) -> str:
        """Return the whole content as JSON, with all digits."""
        return render(self.table, "json")

    def to_html(self, axes: tuple[str, str] | None = None) -> str:
        """Return the report, one page with the table and the figures.

        Args:
            axes: Metrics of the Pareto plot; None for the two on which the methods disagree most.

        Raises:
            ValueError: If a metric is unknown.
        """
        self._check_axes(axes)
        return report.html(self.table, report_files.figures_of(self.table, self.store, axes), title=report.title(self.table))

    def write_report(self, folder: str | os.PathLike[str] | None = None, *, axes: tuple[str, str] | None = None) -> Path:
        """Write the report, and every figure as PNG and PDF.

        Args:
            folder: Folder for the files; None for ``<folder of the runs>/<experiment>/comparison``.
            axes: Metrics of the Pareto plot; None for the two on which the methods disagree most.

        Returns:
            Path of the page, ``report.html``.

        Raises:
            ValueError: If a metric is unknown.
            OSError: If the folder cannot be written.
        """
        self._check_axes(axes)
        place = self.folder if folder is None else Path(folder).expanduser().resolve()
        return report_files.write_report(self.table, (), self.store, place, axes=axes, command=None)[0]

    def _check_axes(self, axes: tuple[str, str] | None) -> None:
        for name in axes or ():
            if name not in self.table.metrics:
                raise ValueError(unknown("metric in axes", name, self.table.metrics))


def compare(
    experiment: str,
    folder: str | os.PathLike[str] = "runs",
    *,
    runs: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    baselines: Mapping[str, float] | Literal["none"] | None = None,
    higher_is_better: Collection[str] | None = None,
    title: str = "",
    output: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Compare the recorded runs of an experiment: methods in rows, with means over seeds, ranks and verdicts.

    A row is a pair of methods with equal parameters. Of several finished runs with equal methods, parameters and seed the
    newest counts. Runs of single-task networks are baselines and no rows.

    Args:
        experiment: Name that the runs were recorded with.
        folder: Folder with ``mlflow.db``, used if ``MLFLOW_TRACKING_URI`` is not set.
        runs: Ids of runs or of sweeps in MLflow; None for all runs that have ended.
        settings: Values that parameters of the runs must have, such as ``{"train.lr": 0.1}``.
        baselines: Single-task value of each metric, for delta_m, or ``"none"``. None: the values that the runs declare, else
            means of the recorded single-task runs, else none.
        higher_is_better: Names of the metrics that should be large; None: the names that the runs declare.
        title: Text above the table.
        output: Folder in which the report is written at once; None: see `Comparison.write_report`.

    Returns:
        The comparison.

    Raises:
        ValueError: If an id or a setting is unknown, no run has finished, or the runs cannot be compared.
        TypeError: If an argument has the wrong type.
        OSError: If nothing is recorded, the server does not answer, or ``output`` cannot be written.
    """
    if isinstance(runs, str) or isinstance(higher_is_better, str):
        raise TypeError("runs and higher_is_better must be sequences of texts, but got one text. Use a tuple.")
    store = Store(experiment, str(folder))
    recorded = store.runs()
    filters = {key: str(value) for key, value in (settings or {}).items()}
    selected = select_runs(store, recorded, runs or (), filters)
    table = table_of_runs(
        experiment, selected, recorded, baselines=_given(baselines), higher_is_better=higher_is_better, title=title
    )
    made = Comparison(table, store, (Path(folder).expanduser() / experiment / "comparison").resolve())
    if output is not None:
        made.write_report(output)
    return made


def table_of_runs(
    experiment: str,
    selected: Sequence[RecordedRun],
    recorded: Sequence[RecordedRun],
    *,
    baselines: Baselines | Literal["none"] | None = None,
    higher_is_better: Collection[str] | None = None,
    title: str = "",
) -> RunTable:
    """Return the table of runs that declare how to compare them.

    Args:
        experiment: Name of the experiment.
        selected: Runs to compare, newest first.
        recorded: All recorded runs, newest first.
        baselines: Single-task values, or ``"none"`` for a table without delta_m. None: declared or recorded values.
        higher_is_better: Names of the metrics that should be large; None: the names that the runs declare.
        title: Text above the table.

    Raises:
        ValueError: If the runs have different metrics or data, or declare no directions or different ones.
    """
    check_metrics(selected)
    higher = directions(selected) if higher_is_better is None else frozenset(higher_is_better)
    names = {name for run in selected for name in run.metrics}
    for name in () if higher_is_better is None else higher - names:
        raise ValueError(unknown("metric in higher_is_better", name, names))
    known = baselines or declared_baselines(selected) or recorded_baselines(selected, recorded)
    metrics, origin = (None, "") if known is None or known == "none" else known
    table = tabulate(
        selected, experiment=experiment, higher_is_better=higher, baselines=metrics, baselines_from=origin, title=title
    )
    remarks = (remark_on_missing_baselines(recorded),) if known is None else ()
    return replace(table, notes=(*table.notes, *remarks))


def _given(baselines: Mapping[str, float] | Literal["none"] | None) -> Baselines | Literal["none"] | None:
    """Return baselines that a caller gives.

    Raises:
        TypeError: If they are no mapping of names to numbers.
    """
    if baselines is None or baselines == "none":
        return baselines
    if not isinstance(baselines, Mapping):
        raise TypeError(f"baselines must be a dict of numbers by metric, or 'none', but got {baselines!r}.")
    return Baselines({name: baseline(name, value) for name, value in baselines.items()}, "as given")
