"""Loggers in addition to MLflow, which write into the folder of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balance.tracking import TensorBoard, WandB

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from balance.tracking import Logger


def further_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Return the loggers of the entry ``loggers``; nothing is written before the first record.

    Args:
        config: Configuration of the run.
        folder: Folder of the run, whose name identifies a run that is resumed.

    Raises:
        ModuleNotFoundError: If the package of a logger is not installed.
    """
    made: dict[str, Logger] = {}
    for name in config.loggers:
        if name == "tensorboard":
            made[name] = TensorBoard(folder / name)
        else:
            made[name] = WandB(config.experiment, folder, name=folder.name, id=folder.name, resume="allow")
    return list(made.values())
