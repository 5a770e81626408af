"""Image files that are decoded once, into one file that is mapped into memory.

That file has a header of 4096 bytes (JSON, padded with spaces), which says what it was made of, and then N images of
(3, 64, 64) bytes. It is written under another name and renamed when it is whole, by one process at a time; the others wait.
Neither torch nor an experiment is imported here, so that processes that decode start in a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING

import joblib
import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SIDE = 64
SHAPE = (3, SIDE, SIDE)
SIZE = 3 * SIDE * SIDE  # bytes of an image
HEADER = 4096
CHUNK = 500  # images that a worker decodes at a time
MANY = 5000  # images from which on it pays to start workers
SHOWN = 5  # damaged files that an error names


def decoded(source: Path, names: Sequence[str], size: tuple[int, int], folder: Path, workers: int | None = None) -> Path:
    """The file with the images of a data set, made if it is not there.

    Args:
        source: Folder of the N images.
        names: Of the images, in their order.
        size: Width and height that they must have, in pixels.
        folder: Where decoded images are kept.
        workers: Processes that decode; None: one for each core, if there are many images.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If an image is damaged or has another size.
        OSError: If ``folder`` cannot be written to.
    """
    header = _header(source, names)
    file = folder / f"images-{hashlib.sha256(header).hexdigest()[:16]}.u8"
    paths = [str(source / name) for name in names]
    build_once(
        file,
        lambda: _is_whole(file, header, len(paths)),
        lambda partial: _decode_all(partial, header, paths, size, workers),
    )
    return file


def mapped(file: Path, count: int) -> NDArray[np.uint8]:
    """The images of a file that `decoded` made, read when they are used. Shape (N, 3, 64, 64)."""
    return np.memmap(file, np.uint8, "r", HEADER, (count, *SHAPE))


def build_once(target: Path, is_whole: Callable[[], bool], build: Callable[[Path], None]) -> None:
    """Make a file or a folder unless it is whole already; other processes wait, and never see a part of it.

    Args:
        target: What to make.
        is_whole: Whether ``target`` is what it should be.
        build: Makes it under the name that it is given.

    Raises:
        OSError: If ``target`` cannot be written.
    """
    if is_whole():  # without the lock, so that a folder that is only readable will do
        return
    with _locked(target):
        if is_whole():
            return
        for left in target.parent.glob(f"{target.name}.*.partial"):  # by a process that was killed, since we hold the lock
            _remove(left)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            build(partial)
            _remove(target)
            partial.replace(target)
        finally:
            _remove(partial)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            yield
    except OSError as error:
        raise OSError(
            f"data.cache: cannot write {target} ({error.strerror or error}). Choose another folder with data.cache=..."
        ) from error


def decode(file: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image, resized bilinearly to a square. Shape (3, 64, 64).

    Raises:
        ValueError: If it has not this width and height.
        OSError: If it cannot be read.
    """
    with Image.open(file) as image:
        if image.size != size:
            raise ValueError(f"must have {size[0]} x {size[1]} pixels, but has {image.width} x {image.height}")
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(small).transpose(2, 0, 1)
    return pixels


def _header(source: Path, names: Sequence[str]) -> bytes:
    """What the file is made of: names, sizes and times of the images, and how they are resized."""
    with os.scandir(source) as entries:
        found = {entry.name: entry.stat() for entry in entries}
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{source} must hold the {len(names)} images of the lists, but {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Unpack the images again."
        )
    stamps = np.array([(found[name].st_size, found[name].st_mtime_ns) for name in names], dtype="<i8")
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(stamps.tobytes())
    content = {"format": 1, "images": len(stamps), "shape": SHAPE, "resized": "bilinear", "made_of": digest.hexdigest()}
    return json.dumps(content).encode().ljust(HEADER)


def _is_whole(file: Path, header: bytes, count: int) -> bool:
    try:
        if file.stat().st_size != HEADER + count * SIZE:
            return False
        with file.open("rb") as stream:
            return stream.read(HEADER) == header
    except (FileNotFoundError, NotADirectoryError):
        return False


def _decode_all(partial: Path, header: bytes, paths: Sequence[str], size: tuple[int, int], workers: int | None) -> None:
    with partial.open("wb") as stream:
        stream.write(header)
    if workers is None:
        workers = joblib.cpu_count() if len(paths) >= MANY else 1
    starts = range(0, len(paths), CHUNK)
    jobs = (joblib.delayed(_decode_chunk)(partial, start, paths[start : start + CHUNK], size) for start in starts)
    results: Iterator[list[str]] = joblib.Parallel(n_jobs=workers, return_as="generator")(jobs)
    console = Console(file=sys.stderr)
    quiet = len(paths) < MANY
    damaged = [
        line
        for lines in track(results, "Decoding images, once", total=len(starts), console=console, transient=True, disable=quiet)
        for line in lines
    ]
    if damaged:
        raise ValueError(f"Images are damaged: {_some(damaged, '; ')}. Unpack them again.")
    with partial.open("r+b") as stream:
        os.fsync(stream.fileno())


def _decode_chunk(partial: Path, start: int, paths: Sequence[str], size: tuple[int, int]) -> list[str]:
    """Decode images into their place in the file; returns what is wrong with those that are damaged."""
    images = np.empty((len(paths), *SHAPE), dtype=np.uint8)
    damaged = []
    for image, path in zip(images, paths, strict=True):
        try:
            image[...] = decode(path, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            damaged.append(f"{path}: {error}")
    with partial.open("r+b") as stream:  # not a map of memory, for which a full disk is a crash
        stream.seek(HEADER + start * SIZE)
        stream.write(images.tobytes())
    return damaged


def _some(items: Sequence[str], separator: str = ", ") -> str:
    rest = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
