"""Runs that a command line selects."""

from __future__ import annotations

from omegaconf import OmegaConf

from balance.comparison.store import Store


def reason_for_no_runs(name: str, output_dir: str) -> str:
    """Return the reason why no recorded run of an experiment can be compared; empty if some can.

    Raises:
        OSError: If the server does not answer.
    """
    try:
        store = Store(name, output_dir)
    except FileNotFoundError as error:
        return str(error)
    if any(run.finished and not run.is_single_task for run in store.runs()):
        return ""
    return f"No finished runs of '{name}' in {store.place}."


def as_recorded(value: str) -> str:
    """Return the value of an override in the form that MLflow shows: ``1e-3`` is ``0.001``."""
    return str(OmegaConf.from_dotlist([f"value={value}"]).value)
