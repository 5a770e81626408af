"""Records of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import require_package

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from .logger import Status


class TensorBoard:
    """An event file for ``tensorboard --logdir``, created at the first record.

    Metrics are scalars. Texts and tags are on the page "Text". TensorBoard has no files, so a file is recorded as its path.

    Args:
        folder: Folder of the event file, one for each run.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require_package("tensorboard", "tensorboard")
        self.folder = Path(folder).expanduser()
        self._writer: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, also infinite numbers and NaN."""
        writer = self._opened()
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_text(self, text: str, file: str) -> None:
        """Record a text under the name of a file."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # a code block of Markdown
        self._opened().add_text(file, indented)

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """Record the path of a file, under its name in ``folder``."""
        self._opened().add_text("/".join(filter(None, (folder, file.name))), str(file.resolve()))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record each tag as a text."""
        for name, value in tags.items():
            self._opened().add_text(f"tags/{name}", value)

    def close(self, status: Status = "FINISHED") -> None:
        """Record the status and close the event file, if something was recorded."""
        if self._writer is not None:
            self._writer.add_text("tags/status", status)
            self._writer.close()
            self._writer = None

    def _opened(self) -> Any:
        """Return the writer of the event file."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            self._writer = SummaryWriter(str(self.folder))
        return self._writer
