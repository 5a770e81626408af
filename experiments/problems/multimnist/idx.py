"""The IDX files of MNIST: big-endian numbers of four bytes (magic number, sizes), then pixels or labels, a byte each."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IMAGES, LABELS = 2051, 2049  # magic numbers: bytes (type 8) in three dimensions, in one
PARTS = {"train": "train", "test": "t10k"}
FOLDERS = ("", "raw", "MNIST/raw")  # as downloaded, and as torchvision keeps them


class Digits(NamedTuple):
    """Images (N, rows, columns), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor


def read(folder: str | Path, part: str) -> Digits:
    """Read images and labels of one part of MNIST.

    Args:
        folder: Folder with files such as ``train-images-idx3-ubyte``, plain or with ``.gz``.
        part: ``"train"`` or ``"test"``.

    Returns:
        Images and labels.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is truncated or has other content than its name states.
    """
    image_file, label_file = (find(Path(folder).expanduser(), PARTS[part], kind) for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_array(image_file, IMAGES), read_array(label_file, LABELS)
    if len(images) != len(labels):
        raise ValueError(f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels. Fetch both again.")
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_file} must have images of 28 x 28 pixels, but has {tuple(images.shape[1:])}.")
    if len(labels) == 0 or int(labels.max()) > 9:
        actual = f"the label {int(labels.max())}" if len(labels) else "no labels"
        raise ValueError(f"{label_file} must have labels 0..9, but has {actual}. Is it a file of another data set?")
    return Digits(images, labels.long())


def find(folder: Path, part: str, kind: str) -> Path:
    """Find the file of a part and kind under any of the names in use.

    Args:
        folder: Folder of MNIST.
        part: ``"train"`` or ``"t10k"``.
        kind: ``"images-idx3"`` or ``"labels-idx1"``.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    names = [f"{part}-{kind.replace('-', separator)}-ubyte{ending}" for separator in "-." for ending in ("", ".gz")]
    for file in (folder / place / name for place in FOLDERS for name in names):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{part}-{kind}-ubyte or {part}-{kind}-ubyte.gz must be in {folder} (or below, in {FOLDERS[1]} or {FOLDERS[2]}), but "
        "does not exist. Put the four files of MNIST there, or leave the path out to use the digits of scikit-learn."
    )


def read_array(file: Path, magic: int) -> Tensor:
    """Read the bytes of one file, in the shape that its header states.

    Args:
        file: Plain or, by its ending, compressed.
        magic: Magic number at the beginning of the file.

    Returns:
        The array, uint8.

    Raises:
        ValueError: If it is truncated, damaged, longer than it states, or has another magic number.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} must be a gzip file, but cannot be read: {error}. Fetch it again.") from None
    dimensions = magic % 256
    if len(content) < 4 * (1 + dimensions):
        raise ValueError(f"{file} is truncated: it has {len(content)} bytes, which are no header. Fetch it again.")
    actual, *sizes = np.frombuffer(content, dtype=">i4", count=1 + dimensions).tolist()
    if actual != magic:
        raise ValueError(
            f"{file} must begin with the magic number {magic}, but begins with {actual}. Is it another file, renamed?"
        )
    stated = 4 * (1 + dimensions) + math.prod(sizes)
    if len(content) != stated:
        state = "truncated" if len(content) < stated else "too long"
        raise ValueError(
            f"{file} is {state}: it must have {stated} bytes for sizes {sizes}, but has {len(content)}. Fetch it again."
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=4 * (1 + dimensions)).reshape(sizes).copy())
