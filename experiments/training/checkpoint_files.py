"""Checkpoints on disk, which a kill at any moment leaves readable: ``last.pt`` of a run's folder, and the one before."""

from __future__ import annotations

import os
import warnings
import zipfile
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LAST, PREVIOUS = "last.pt", "previous.pt"


def save_last(state: Mapping[str, Any], folder: Path) -> None:
    """Save a checkpoint as ``last.pt``, and keep the checkpoint before it as ``previous.pt``."""
    temporary = write_temporary(folder / LAST, lambda file: torch.save(dict(state), file))
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    publish(temporary, folder / LAST)


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file in place of the file before, if any, in one step that a kill does not interrupt.

    Args:
        path: Path of the file.
        write: Writes the content to an open file.
    """
    publish(write_temporary(path, write), path)


def write_temporary(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write a file to the disk next to its future path.

    Args:
        path: Path that the file will have.
        write: Writes the content to an open file.

    Returns:
        The path of the file.
    """
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a file its name, and write the entry of the folder to the disk."""
    temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint of a folder that is intact, with a warning for a damaged one; None without any."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return load(path)
            except ValueError as error:
                warnings.warn(f"{error} The checkpoint before it is used.", stacklevel=2)
    return None


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint, with all tensors on the host.

    Args:
        path: A file of `torch.save`, which is a ZIP archive with a checksum of every record.

    Returns:
        The state that was saved.

    Raises:
        ValueError: If the file is truncated, or a checksum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
    except Exception as error:  # noqa: BLE001 - the readers of a damaged file can raise anything
        damaged = str(error).partition("\n")[0]
    raise ValueError(f"{path} must be an intact checkpoint, but it is damaged ({damaged}).") from None
