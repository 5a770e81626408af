"""The layout of CelebA: two lists of text and a folder of images.

    Anno/list_attr_celeba.txt     line 1: number of images; line 2: the 40 names; then ``000001.jpg -1  1 ...``
    Eval/list_eval_partition.txt  ``000001.jpg 0``: 0 train, 1 validation, 2 test; the images in the order of the other list
    Img/img_align_celeba/*.jpg    178 x 218 pixels

The folders Anno, Eval and Img may be left out. The last line needs no line break; the loader of the FAMO repository loses that
line without one.

Source:
    Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

ATTRIBUTES = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose"),
    *("Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses"),
    *("Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes"),
    *("No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling"),
    *("Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace"),
    *("Wearing_Necktie", "Young"),
)
WIDTH, HEIGHT = 178, 218  # of the aligned images, in pixels
PARTS = ("train", "validation", "test")  # as the partition numbers them
ATTRIBUTE_LIST = ("Anno", "list_attr_celeba.txt")
PARTITION_LIST = ("Eval", "list_eval_partition.txt")
IMAGES = ("Img", "img_align_celeba")


class Listing(NamedTuple):
    """The content of the two lists for N images."""

    folder: Path  # of the images
    names: tuple[str, ...]
    labels: NDArray[np.bool_]  # (N, 40)
    parts: NDArray[np.uint8]  # (N,), index into PARTS


def read(root: Path) -> Listing:
    """Read the lists of a data set; the images themselves are not opened.

    Args:
        root: Folder with Anno, Eval and Img, or with their content.

    Returns:
        Names, labels and parts of the images.

    Raises:
        FileNotFoundError: If a list or the folder of the images is missing.
        ValueError: If a list is damaged, or the lists do not agree.
    """
    attributes, partition, images = (_find(root, *place) for place in (ATTRIBUTE_LIST, PARTITION_LIST, IMAGES))
    names, labels = _read_attributes(attributes)
    parts = _read_partition(partition, names, attributes)
    return Listing(images, names, labels, parts)


def write(root: Path, labels: NDArray[np.bool_], parts: NDArray[np.uint8]) -> tuple[Path, ...]:
    """Write both lists and make the folder of the images.

    Args:
        root: An existing folder.
        labels: Shape (N, 40).
        parts: Index into ``PARTS``. Shape (N,).

    Returns:
        Files for the N images.
    """
    names = [f"{number:06d}.jpg" for number in range(1, len(labels) + 1)]
    rows = ([name, *("1" if label else "-1" for label in row)] for name, row in zip(names, labels, strict=True))
    _write(root, ATTRIBUTE_LIST, [str(len(names)), " ".join(ATTRIBUTES), *map(" ".join, rows)])
    _write(root, PARTITION_LIST, [f"{name} {part}" for name, part in zip(names, parts, strict=True)])
    images = root.joinpath(*IMAGES)
    images.mkdir(parents=True)
    return tuple(images / name for name in names)


def _write(root: Path, place: tuple[str, str], lines: Sequence[str]) -> None:
    file = root.joinpath(*place)
    file.parent.mkdir()
    file.write_text("\n".join(lines) + "\n", encoding="ascii")


def _find(root: Path, folder: str, name: str) -> Path:
    for place in (root / folder / name, root / name):
        if place.exists():
            return place
    raise FileNotFoundError(
        f"data.path must be a folder with CelebA's {folder}/{name}, but {root} has none. "
        "Unpack there the files of CelebA's authors: Anno, Eval and Img/img_align_celeba."
    )


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text, but {error}. Fetch it again.") from None


def _read_attributes(file: Path) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    lines = _lines(file)
    header = lines[1].split() if len(lines) > 1 else []
    if header != list(ATTRIBUTES):
        wrong = next((name for name, right in zip(header, ATTRIBUTES, strict=False) if name != right), f"{len(header)} words")
        raise ValueError(f"{file}, line 2, must name CelebA's 40 attributes in their order, but has '{wrong}'. Fetch it again.")
    rows = [line for line in lines[2:] if line.strip()]
    if lines[0].strip() != str(len(rows)):
        raise ValueError(
            f"{file} must list '{lines[0].strip()}' images, as its first line states, but lists {len(rows)}. Fetch it again."
        )
    names = []
    labels = np.empty((len(rows), len(ATTRIBUTES)), dtype=np.bool_)
    for i, row in enumerate(rows):
        name, *values = row.split()
        if len(values) != len(ATTRIBUTES) or not {"1", "-1"}.issuperset(values):
            raise ValueError(
                f"{file}: '{name}' must be followed by 40 times 1 or -1, but got {' '.join(values)!r}. Fetch it again."
            )
        names.append(name)
        labels[i] = [value == "1" for value in values]
    return tuple(names), labels


def _read_partition(file: Path, names: tuple[str, ...], attributes: Path) -> NDArray[np.uint8]:
    rows = [line.split() for line in _lines(file) if line.strip()]
    if len(rows) != len(names):
        raise ValueError(
            f"{file} must list the {len(names)} images of {attributes.name}, but lists {len(rows)}. Fetch both again."
        )
    for row, name in zip(rows, names, strict=True):
        if len(row) != 2 or row[0] != name or row[1] not in {"0", "1", "2"}:
            raise ValueError(
                f"{file} must list the images in the order of {attributes.name}, each with 0, 1 or 2, "
                f"but in the place of '{name}' it has {' '.join(row)!r}. Fetch both again."
            )
    parts = np.array([int(part) for _, part in rows], dtype=np.uint8)
    for index, part in enumerate(PARTS):
        if index not in parts:
            raise ValueError(f"{file} must have images for {part} (number {index}), but has none. Fetch it again.")
    return parts
