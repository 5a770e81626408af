"""A cache of decoded images: one file that is mapped into memory.

The file has a header of 4096 bytes (JSON, padded with spaces), which describes its sources, and then N images of (3, 64, 64)
bytes. One process at a time writes it, under another name, and renames it when it is complete; other processes wait. This
module imports neither torch nor a problem, so that processes that decode start in a second.
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
MANY = 5000  # images from which on starting workers pays
SHOWN = 5  # files that an error lists


def decoded(source: Path, names: Sequence[str], size: tuple[int, int], folder: Path, workers: int | None = None) -> Path:
    """Return the file with the decoded images of a data set; decode them if it does not exist.

    Args:
        source: Folder of the N images.
        names: Names of the images, in their order.
        size: Width and height of the images, in pixels.
        folder: Folder of the cache.
        workers: Processes that decode; None: one for each core, if there are many images.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If an image is missing.
        ValueError: If an image is damaged or has another size.
        OSError: If ``folder`` cannot be written.
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
    """Map a file that `decoded` has returned into memory. Shape (N, 3, 64, 64)."""
    return np.memmap(file, np.uint8, "r", HEADER, (count, *SHAPE))


def build_once(target: Path, is_whole: Callable[[], bool], build: Callable[[Path], None]) -> None:
    """Make a file or a folder unless it is complete; other processes wait, and never see an incomplete one.

    Args:
        target: File or folder.
        is_whole: Return whether ``target`` is complete and up to date.
        build: Make the file or folder under the given name.

    Raises:
        OSError: If ``target`` cannot be written.
    """
    if is_whole():  # checked without the lock, so that a read-only folder can be used
        return
    with _locked(target):
        if is_whole():
            return
        for remnant in target.parent.glob(f"{target.name}.*.partial"):  # of a process that was killed while it had the lock
            _remove(remnant)
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
    """Decode an image and resize it bilinearly to a square.

    Args:
        file: The image.
        size: Width and height that it must have.

    Returns:
        Shape (3, 64, 64).

    Raises:
        ValueError: If it has another size.
        OSError: If it cannot be read.
    """
    with Image.open(file) as image:
        if image.size != size:
            raise ValueError(f"must have {size[0]} x {size[1]} pixels, but has {image.width} x {image.height}")
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(small).transpose(2, 0, 1)
    return pixels


def _header(source: Path, names: Sequence[str]) -> bytes:
    """Describe the sources of the file: names, sizes and times of the images, and the interpolation."""
    with os.scandir(source) as entries:
        stats = {entry.name: entry.stat() for entry in entries}
    missing = [name for name in names if name not in stats]
    if missing:
        raise FileNotFoundError(
            f"{source} must have the {len(names)} images of the lists, but {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Unpack the images again."
        )
    stamps = np.array([(stats[name].st_size, stats[name].st_mtime_ns) for name in names], dtype="<i8")
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
    """Decode images into their place in the file and return a message for each damaged image."""
    images = np.empty((len(paths), *SHAPE), dtype=np.uint8)
    damaged = []
    for image, path in zip(images, paths, strict=True):
        try:
            image[...] = decode(path, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            damaged.append(f"{path}: {error}")
    with partial.open("r+b") as stream:  # with a memory map a full disk would end the process
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
