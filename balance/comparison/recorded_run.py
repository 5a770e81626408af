"""A run that `balance.tracking.Tracker` has recorded, read back from the tracking store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Settings = tuple[tuple[str, str], ...]  # sorted pairs of a dotted key and its value

METHOD_GROUPS = ("loss.", "gradient.", "balancer.")  # settings that belong to a pair of methods


@dataclass(frozen=True)
class RecordedRun:
    """A run, of the trainer or of another training loop, read back from the tracking store.

    Attributes:
        run_id: Identifier in MLflow.
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or None.
        seed: Seed of the run.
        settings: All other entries of the configuration that decide the result, by dotted key.
        metrics: Test metrics by ``<task>/<metric>``.
        finished: Whether the run completed.
        step_ms: Time of a training step in milliseconds.
        step_mib: Memory that a training step needs in addition to parameters and the optimizer's state, in MiB.
        fingerprint: Hash of configuration and seed.
        configuration: Name of the configuration in a sweep file; empty without one.
        higher_is_better: Metrics that should be large, as the run declares them; None if it does not.
        baselines: Single-task value of each metric, as the run declares them; None if it does not.
        task: Name of the only task of a single-task run, as the run declares it; empty if it does not.
    """

    run_id: str
    loss_method: str
    gradient_method: str | None
    seed: int
    settings: Mapping[str, str]
    metrics: Mapping[str, float]
    finished: bool = True
    step_ms: float = math.nan
    step_mib: float = math.nan
    fingerprint: str = ""
    configuration: str = ""
    higher_is_better: frozenset[str] | None = None
    baselines: Mapping[str, float] | None = None
    task: str = ""

    @property
    def common(self) -> Settings:
        """Settings that do not belong to the methods, sorted."""
        return tuple(sorted((key, value) for key, value in self.settings.items() if not key.startswith(METHOD_GROUPS)))

    @property
    def is_single_task(self) -> bool:
        """True if the run trained one task only: then it is a baseline and no row of a table."""
        return self.loss_method == "stl"
