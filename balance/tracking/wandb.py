"""Records of a run for Weights & Biases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import require_package

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from .logger import Status

STEP = "step"  # the horizontal axis: the counter of wandb refuses a step that is smaller than the last one
FOLDER = "balance"  # for files of the run, among which wandb writes config.yaml and others


class WandB:
    """A run of Weights & Biases, started at the first record. Tags are entries of its configuration.

    Texts and files are below ``balance/`` among the files of the run.

    Args:
        project: Name of the project.
        folder: Folder of the local files, created if it does not exist.
        **options: Further arguments of ``wandb.init``, such as ``name``, ``entity`` or ``mode="offline"``; ``id`` and
            ``resume`` continue a run.

    Raises:
        ModuleNotFoundError: If wandb is not installed.
    """

    def __init__(self, project: str, folder: str | os.PathLike[str] = "runs", **options: Any) -> None:
        require_package("wandb", "wandb")
        self.project = project
        self.folder = Path(folder).expanduser()
        self.options = options
        self._run: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; steps may come in any order."""
        self._started().log({**metrics, STEP: step})

    def log_text(self, text: str, file: str) -> None:
        """Record a text as a file of the run."""
        path = self._place(file)
        path.write_text(text, encoding="utf-8")
        self._upload(path)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Copy a file to the files of the run, in ``folder`` or at the top for None."""
        path = self._place("/".join(filter(None, (folder, file.name))))
        shutil.copyfile(file, path)
        self._upload(path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record values that describe the run in its configuration."""
        self._started().config.update(dict(tags), allow_val_change=True)

    def close(self, status: Status = "FINISHED") -> None:
        """End the run, if something was recorded; one that did not finish counts as failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "FINISHED" else 1)
            self._run = None

    def _started(self) -> Any:
        """Return the run."""
        if self._run is None:
            import wandb  # noqa: PLC0415

            self.folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(project=self.project, dir=str(self.folder), **self.options)
            self._run.define_metric("*", step_metric=STEP)
        return self._run

    def _place(self, name: str) -> Path:
        """Return the path of a file of the run, in a folder that exists."""
        path = Path(self._started().dir) / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _upload(self, path: Path) -> None:
        self._run.save(str(path), base_path=self._run.dir, policy="now")
