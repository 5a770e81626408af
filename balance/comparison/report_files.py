"""Files of a report: the page and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import report
from .figures import gallery
from .figures.per_setting import metrics_per_setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from .report import Section
    from .run_table import RunTable
    from .store import Store


def write_report(
    compared: RunTable,
    sections: Sequence[Section],
    store: Store,
    folder: Path,
    *,
    axes: tuple[str, str] | None,
    command: str | None,
) -> list[Path]:
    """Write the page and the figures of a comparison.

    Args:
        compared: The comparison.
        sections: Further tables for the page.
        store: Store with the curves of the runs.
        folder: Folder for the files.
        axes: Metrics of the Pareto plot; None for a default.
        command: Command that made the page, if any.

    Returns:
        The files, the page first.

    Raises:
        OSError: If the folder cannot be written.
    """
    figures = figures_of(compared, store, axes)
    page = report.html(compared, figures, sections, title=report.title(compared), command=command)
    return _write(folder, {"report.html": page}, figures)


def figures_of(compared: RunTable, store: Store, axes: tuple[str, str] | None) -> dict[str, Figure]:
    """Return the figures of a comparison by name.

    Args:
        compared: The comparison.
        store: Store with the curves of the runs.
        axes: Metrics of the Pareto plot; None for a default.
    """
    curves = {row.label: store.curves(run.run_id for run in row.runs) for row in compared.rows}
    return gallery.every_figure(compared, curves, axes)


def write_figure_per_setting(key: str, comparisons: Mapping[str, RunTable], store: Store, folder: Path) -> list[Path]:
    """Write the figure with the metrics of all rows for each value of a setting.

    Args:
        key: The setting.
        comparisons: RunTable of the runs with each value of the setting.
        store: Store with the curves of the runs.
        folder: Folder for the files.

    Returns:
        The files.

    Raises:
        OSError: If the folder cannot be written.
    """
    validation = {
        run.run_id: store.curves([run.run_id], ("val/",))
        for compared in comparisons.values()
        for row in compared.rows
        for run in row.runs
    }
    return _write(folder, {}, {f"metrics_per_{key}": metrics_per_setting(key, comparisons, validation)})


def _write(folder: Path, pages: Mapping[str, str], figures: Mapping[str, Figure]) -> list[Path]:
    """Write pages and figures; return the files, pages first."""
    try:
        files = gallery.save(figures, folder)
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"--output: cannot write to {folder} ({error.strerror}). Choose another folder.") from None
    return [*(folder / name for name in pages), *files]
