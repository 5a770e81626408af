"""A sweep in a YAML file: named configurations, a grid of further settings, and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from balance.config import compose
from experiments.config.keys import check_keys
from experiments.config.layers import values_by_key
from experiments.sweeps.plan import Configuration

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class ConfigurationEntry:
    """One way to train.

    Attributes:
        loss_method: Name, or several names joined by ``+``.
        gradient_method: Name, or None.
        overrides: Entries of the trainer's configuration, such as ``model.width=4``.
    """

    loss_method: str = "ls"
    gradient_method: str | None = None
    overrides: list[str] = field(default_factory=list)


@dataclass
class SweepFile:
    """A sweep: every configuration with every combination of the grid and every seed.

    Attributes:
        experiment: Name of the experiment.
        seeds: Number, such as 3 for 0, 1, 2, or list of seeds: ``"4,7"``.
        overrides: Entries of the trainer's configuration for all runs.
        grid: Values of further entries of the trainer's configuration, by key.
        configurations: Ways to train by name.
    """

    experiment: str = "digits"
    seeds: str = "1"
    overrides: list[str] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    configurations: dict[str, ConfigurationEntry] = field(default_factory=dict)


def read_sweep_file(file: Path) -> SweepFile:
    """Read a sweep, and check its form.

    Returns:
        The sweep.

    Raises:
        ValueError: If the file cannot be read, or a key or a type is wrong.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        check_keys(content, SweepFile, "the file")
        for name, entry in content.get("configurations", {}).items():
            check_keys(entry, ConfigurationEntry, f"configuration '{name}'")
        config = compose(SweepFile, content, ())
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must be a YAML file with a sweep, but: {error}") from None
    if not config.configurations or not all(config.grid.values()):
        raise ValueError(f"{file} must have at least one configuration and at least one value for each key of its grid.")
    return SweepFile(
        experiment=config.experiment,
        seeds=config.seeds,
        overrides=list(config.overrides),
        grid={str(key): list(values) for key, values in config.grid.items()},
        configurations={
            str(name): ConfigurationEntry(entry.loss_method, entry.gradient_method, list(entry.overrides))
            for name, entry in config.configurations.items()
        },
    )


def configurations(sweep: SweepFile) -> Iterator[Configuration]:
    """Yield the configurations of a sweep, with their names."""
    for name, entry in sweep.configurations.items():
        yield Configuration(entry.loss_method, entry.gradient_method or "none", tuple(entry.overrides), name)


def check_overrides(sweep: SweepFile, overrides: list[str]) -> None:
    """Check that no override sets the experiment, or an entry that the configurations or the grid set.

    Raises:
        ValueError: If one does.
    """
    fixed = {key for entry in sweep.configurations.values() for key in values_by_key(entry.overrides)}
    for key in values_by_key(overrides):
        if key in fixed | sweep.grid.keys() | {"experiment"}:
            raise ValueError(f"{key} must be set by the sweep file only, but got an override. Change the file.")
