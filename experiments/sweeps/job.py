"""One run of the trainer in a sweep."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from balance.comparison.grouping import method_label
from balance.config import build_balancer
from experiments.config.layers import configure
from experiments.problems import base as problems
from experiments.recording.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from omegaconf import DictConfig


@dataclass(frozen=True)
class Job:
    """One run of the trainer in a sweep.

    Attributes:
        overrides: Entries of the trainer's configuration, such as ``seed=0``.
        config: Configuration with these entries.
        fingerprint: Hash of the configuration.
        name: Name of the configuration in a sweep file; empty without one.
        cell: Overrides that distinguish this run from others with an equal name or equal methods.
        finished: Whether a finished run with this configuration is recorded.
    """

    overrides: tuple[str, ...]
    config: DictConfig
    fingerprint: str
    name: str = ""
    cell: tuple[str, ...] = ()
    finished: bool = False

    @property
    def is_baseline(self) -> bool:
        """True if the run trains one task only."""
        return bool(self.config.loss_method == "stl")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the trained tasks."""
        tasks = problems.tasks_of(self.config)
        return (tasks[self.config.loss.main_task],) if self.is_baseline else tasks

    @property
    def label(self) -> str:
        """Name or methods as in a table, for a baseline ``stl`` and its task; followed by the cell."""
        methods = method_label(self.config.loss_method, self.config.gradient_method)
        return " ".join([self.name or (f"stl {self.tasks[0]}" if self.is_baseline else methods), *self.cell])

    def with_state(self, finished: Collection[str]) -> Job:
        """Return the job with its state, given the fingerprints of all finished runs."""
        return replace(self, finished=self.fingerprint in finished)


def make_job(overrides: Sequence[str], name: str = "", cell: tuple[str, ...] = ()) -> Job:
    """Return the job with these entries of the trainer's configuration, which are checked.

    Args:
        overrides: Entries of the trainer's configuration.
        name: Name of the configuration.
        cell: Overrides that the label shows.

    Raises:
        ValueError: If a name, a key or a value is wrong.
        TypeError: If an option has the wrong type.
    """
    config = configure(overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # balancer_warnings() returns them once for all jobs
        build_balancer(config, problems.tasks_of(config))
    folder = Path(config.output_dir).expanduser().resolve()  # workers may have other working directories
    return Job((*overrides, f"output_dir={folder}"), config, fingerprint(config), name, cell)


def balancer_warnings(jobs: Sequence[Job]) -> list[str]:
    """Return the warnings of the library about the methods of the jobs, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for job in {job.label: job for job in jobs}.values():
            build_balancer(job.config, problems.tasks_of(job.config))
    return list(dict.fromkeys(str(warning.message) for warning in caught))
