"""NYUv2 and CityScapes on disk, as data sets whose items are batches; see `experiments.datasets.layouts.dense`."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from experiments.problems.base import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from experiments.datasets.layouts.dense import Layout

START = 512  # bytes, more than the header of such an array has


class Files(Dataset[Batch]):
    """Samples of one split. All headers and labels are checked at once; the arrays are read when they are used.

    An item, for a list of indices, is ``(image, label, depth[, normal])``. Nothing is scaled or normalised.

    - Image: float32 (B, 3, H, W).
    - Label: int64 (B, H, W), -1 = unknown.
    - Depth: float32 (B, 1, H, W), 0 = unknown.
    - Normal: float32 (B, 3, H, W), 0 = unknown.

    Args:
        folder: Folder of the split.
        layout: Layout of the data set.
        numbers: Names of the samples to use; all by default.
        size: (H, W) of the arrays; by default the size of the first image.

    Raises:
        ValueError: If a file is missing, cannot be read, or has the wrong shape or a label that is no class.
    """

    def __init__(
        self, folder: Path, layout: Layout, numbers: Sequence[int] | None = None, size: tuple[int, int] | None = None
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.numbers = list(range(count(folder, layout)) if numbers is None else numbers)
        self.size, self.given = size or image_size(folder, self.numbers[0]), size is not None
        for part in layout.channels:
            for number in self.numbers:
                self.checked_header(part, number, read_bytes(self.file(part, number), START))
        for number in self.numbers:  # a wrong label should not end a run that has reached its test
            self.check_labels(number)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: list[int]) -> Batch:
        numbers = [self.numbers[index] for index in indices]
        return tuple(self.batch(part, numbers) for part in self.layout.channels)

    def file(self, part: str, number: int) -> Path:
        """Return the file of an array."""
        return self.folder / part / f"{number}.npy"

    def checked_header(self, part: str, number: int, content: bytes) -> Header:
        """Return the header of a file that begins with these bytes, after checking it."""
        channels = self.layout.channels[part]
        shape = self.size if channels is None else (*self.size, channels)
        reason = "" if self.given else f" The size is taken from {self.file('image', self.numbers[0])}."
        return checked_header(self.file(part, number), content, shape, reason, integers=part == self.layout.labels)

    def array(self, part: str, number: int) -> NDArray[Any]:
        """Read one file. For arrays as small as these plain reading is faster than a memory map."""
        content = read_bytes(self.file(part, number))
        header = self.checked_header(part, number, content)
        flat = np.frombuffer(content, header.dtype, offset=header.offset)
        return flat.reshape(header.shape, order="F" if header.fortran_order else "C")

    def batch(self, part: str, numbers: Sequence[int]) -> Tensor:
        """Read files of one folder and stack them, with the channels in front."""
        channels = self.layout.channels[part]
        stacked = np.empty((len(numbers), *self.size, channels or 1), np.float32)
        for row, number in zip(stacked, numbers, strict=True):
            row[:] = self.array(part, number).reshape(row.shape)
        tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
        return tensor[:, 0].long() if part == self.layout.labels else tensor

    def check_labels(self, number: int) -> None:
        """Check that all labels of a sample are classes.

        Raises:
            ValueError: If a label is not.
        """
        last = self.layout.num_classes - 1
        stored = self.array(self.layout.labels, number)
        wrong = stored[~((stored >= -1) & (stored <= last) & (stored == np.floor(stored)))]  # NaN as well
        if wrong.size:
            file = self.file(self.layout.labels, number)
            raise ValueError(f"{file}: labels must be 0..{last}, or -1 = unknown, but got {float(wrong[0])}.")


def count(folder: Path, layout: Layout) -> int:
    """Return the number of samples of a split.

    Args:
        folder: Folder of the split.
        layout: Layout of the data set.

    Returns:
        Number of files in each folder.

    Raises:
        ValueError: If the files are not named 0.npy, 1.npy, ... in every folder.
    """
    numbers = {part: numbers_in(folder / part) for part in layout.channels}
    largest = max(max(present, default=-1) for present in numbers.values())
    for part, present in numbers.items():
        missing = sorted(set(range(largest + 1)) - present)
        if missing:
            counts = ", ".join(f"{len(present)} in {part}" for part, present in numbers.items())
            raise ValueError(f"{folder / part / f'{missing[0]}.npy'} is missing. The folders must match, but have {counts}.")
    if largest < 0:
        raise ValueError(f"{folder / 'image'} must have files 0.npy, 1.npy, ..., but has none.")
    return largest + 1


def numbers_in(folder: Path) -> set[int]:
    """Return the numbers of the .npy files in a folder.

    Args:
        folder: Folder of one kind of arrays.

    Returns:
        The numbers.

    Raises:
        ValueError: If the folder does not exist, or a file is not named after a number.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist. data.path must be the folder with train and val in it.")
    files = [file for file in folder.glob("*.npy") if not file.name.startswith(".")]
    for file in files:
        if not file.stem.isdecimal() or file.stem != str(int(file.stem)):
            raise ValueError(f"{file} must be named after a number, such as 0.npy.")
    return {int(file.stem) for file in files}


def image_size(folder: Path, number: int) -> tuple[int, int]:
    """Return height and width of an image."""
    file = folder / "image" / f"{number}.npy"
    shape = checked_header(file, read_bytes(file, START)).shape
    if len(shape) != 3:
        raise ValueError(f"{file} must have shape (H, W, 3), but has {shape}.")
    return shape[0], shape[1]


class Header(NamedTuple):
    """The description of an array at the beginning of its file."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int  # bytes before the first number


@lru_cache(maxsize=256)
def parse(start: bytes) -> Header:
    """Parse the header of a file in NumPy's format. A data set has few different headers, and each is parsed once."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"its version {version} is for other arrays than plain ones")
    return Header(*np.lib.format.read_array_header_1_0(stream), stream.tell())


def read_bytes(file: Path, most: int = -1) -> bytes:
    """Read the first bytes of a file.

    Args:
        file: The file.
        most: Number of bytes; -1 for all.

    Returns:
        The bytes.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return stream.read(most)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing.") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None


def checked_header(
    file: Path, content: bytes, shape: tuple[int, ...] | None = None, reason: str = "", *, integers: bool = False
) -> Header:
    """Return the header of a file, after checking it.

    Args:
        file: File in NumPy's format.
        content: The start of the file, at least.
        shape: Required shape of the array; None for any.
        reason: A sentence for the message about a wrong shape.
        integers: Allow integer types.

    Returns:
        The header.

    Raises:
        ValueError: If the file has no complete array, or the array has another shape or type.
    """
    try:
        header = parse(content[: int.from_bytes(content[8:10], "little") + 10])
    except ValueError as error:
        raise ValueError(f"{file} is not in NumPy's format ({error}). Was it cut off? Copy it again.") from None
    if shape is not None and header.shape != shape:
        raise ValueError(f"{file} must have shape {shape}, but has {header.shape}.{reason}")
    if header.dtype.kind not in ("fiu" if integers else "f"):
        remedy = "" if integers else " Colours must be scaled to 0..1."
        raise ValueError(f"{file} must have a {'real' if integers else 'floating'} type, but has {header.dtype}.{remedy}")
    size, expected = file.stat().st_size, header.offset + math.prod(header.shape) * header.dtype.itemsize
    if size != expected:
        raise ValueError(f"{file} must have {expected} bytes, but has {size}. Was it cut off? Copy it again.")
    return header
