"""Scenes as arrays in memory, and as folders in the layouts of NYUv2 and CityScapes.

A folder has train, val and test, as `experiments.datasets.layouts.dense` describes, and ``scenes.json``, a note on its content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from balance.messages import unknown
from experiments.datasets.layouts.dense import CITYSCAPES, NYUV2
from experiments.datasets.rooms.rendering import Sample, render
from experiments.datasets.rooms.room import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Files = dict[str, NDArray[np.float32]]  # arrays by the name of their folder

FIRST_SEED = {"train": 0, "val": 10_000, "test": 20_000}
LARGEST_SPLIT = 10_000  # so that no two splits have a scene in common
SMALLEST_SIDE = 16  # pixels
NOTE = "scenes.json"

MERGED = {  # the seven classes of the layout of CityScapes
    "floor": ("floor",),
    "ceiling": ("ceiling",),
    "wall": ("wall", "painting"),
    "window": ("window",),
    "seats": ("bed", "chair", "sofa"),
    "furniture": ("furniture", "table"),
    "things": ("books", "objects", "tv"),
}
INVERSE_DEPTH = 0.2  # metres; divided by the depth it is below 0.4922, as in CityScapes


def nyuv2(sample: Sample) -> Files:
    """Return arrays by folder; labels are float32, as the augmentation of the official code requires."""
    return dict(zip(NYUV2.channels, sample, strict=True))


def cityscapes(sample: Sample) -> Files:
    """Return arrays by folder: labels in the order of `MERGED`, and `INVERSE_DEPTH` over depth, where 0 = unknown as well."""
    merged = np.array([next(i for i, names in enumerate(MERGED.values()) if name in names) for name in CLASSES])
    label = np.where(sample.label < 0, -1, merged[sample.label.astype(int)]).astype(np.float32)
    known = sample.depth > 0
    inverse = np.where(known, INVERSE_DEPTH / np.where(known, sample.depth, 1), 0).astype(np.float32)
    return dict(zip(CITYSCAPES.channels, (sample.image, label, inverse), strict=True))


CONVERTERS: dict[str, Callable[[Sample], Files]] = {NYUV2.name: nyuv2, CITYSCAPES.name: cityscapes}


def seeds(split: str, count: int) -> range:
    """Return the seeds of the first scenes of a split.

    Args:
        split: train, val (for validation) or test.
        count: Number of scenes, at most `LARGEST_SPLIT`.

    Returns:
        One seed for each scene.

    Raises:
        ValueError: If there is no such split, or it has fewer scenes.
    """
    if split not in FIRST_SEED:
        raise ValueError(unknown("split", split, FIRST_SEED))
    if not 1 <= count <= LARGEST_SPLIT:
        raise ValueError(f"A split must have 1 to {LARGEST_SPLIT} scenes, but got {count} for '{split}'.")
    return range(FIRST_SEED[split], FIRST_SEED[split] + count)


def arrays(split: str, count: int, *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> Files:
    """Return the first scenes of a split, by the name of their folder on disk. Shapes (count, H, W, ...)."""
    convert = converter(layout, height, width)
    scenes = [convert(render(seed, height, width)) for seed in seeds(split, count)]
    return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}


def write(folder: Path | str, counts: Mapping[str, int], *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> int:
    """Write the first scenes of each split in the layout of a data set; scenes that exist are not rendered again.

    Every file appears at once and complete, so that an interrupted call can be repeated, and several may run at a time.

    Args:
        folder: Folder of the data set; it is made if it does not exist.
        counts: Number of scenes by split: train, val (for validation) and test.
        layout: nyuv2 or cityscapes.
        height: Pixels.
        width: Pixels.

    Returns:
        Number of scenes that were rendered.

    Raises:
        ValueError: If an argument is out of range, or the folder has other content.
        OSError: If the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    convert = converter(layout, height, width)
    wanted = {split: seeds(split, count) for split, count in counts.items()}
    claim(folder, note(layout, height, width))
    names = tuple(convert(Sample(*(np.zeros((1, 1, 1), np.float32),) * 4)))
    rendered = 0
    for split, scenes in wanted.items():
        parts = {name: folder / split / name for name in names}
        missing = missing_numbers(list(parts.values()), len(scenes))
        for i in missing:
            for name, array in convert(render(scenes[i], height, width)).items():
                save(parts[name] / f"{i}.npy", array)
        rendered += len(missing)
    return rendered


def missing_numbers(parts: list[Path], count: int) -> list[int]:
    """Return the numbers, below ``count``, of scenes that lack a file; make the folders that do not exist."""
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    complete = set.intersection(*({file.name for file in part.iterdir()} for part in parts))
    return [i for i in range(count) if f"{i}.npy" not in complete]


def cached(root: Path | str, counts: Mapping[str, int], *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> Path:
    """Return the folder of scenes below ``root``; write the missing ones, see `write`.

    Its name contains the layout, the size and the version of the generator: a change of its source starts a new folder.

    Args:
        root: Parent of such folders.
        counts: Number of scenes by split.
        layout: nyuv2 or cityscapes.
        height: Pixels.
        width: Pixels.

    Returns:
        The folder.
    """
    folder = Path(root).expanduser() / f"{layout}-{height}x{width}-{version()}"
    write(folder, counts, layout=layout, height=height, width=width)
    return folder


def converter(layout: str, height: int, width: int) -> Callable[[Sample], Files]:
    """Return the function from a sample to the files of a layout.

    Args:
        layout: nyuv2 or cityscapes.
        height: Pixels.
        width: Pixels.

    Returns:
        The function.

    Raises:
        ValueError: If there is no such layout, or the scenes are too small.
    """
    if layout not in CONVERTERS:
        raise ValueError(unknown("layout", layout, CONVERTERS))
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"Scenes must have at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, but got {height} x {width}.")
    return CONVERTERS[layout]


def version() -> str:
    """Return a short hash of the source of the generator."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in ("rays", "rendering", "room", "storage")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def note(layout: str, height: int, width: int) -> dict[str, Any]:
    """Return a description of the content of a folder, so that nothing else is mixed with it."""
    return {"layout": layout, "height": height, "width": width, "version": version()}


def claim(folder: Path, content: dict[str, Any]) -> None:
    """Make the folder and leave the note in it.

    Raises:
        ValueError: If the folder has other content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]  # listed before the note is written
    file = folder / NOTE
    if file.exists():
        present = json.loads(file.read_text(encoding="utf-8"))
        if present != content:
            raise ValueError(f"{folder} must be for {content}, but has other scenes in it: {present}. Choose another folder.")
    elif others:
        raise ValueError(f"{folder} must be empty or a folder of scenes, but has something else in it. Choose another folder.")
    else:
        replace(file, lambda unfinished: unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8"))


def save(file: Path, array: NDArray[np.float32]) -> None:
    """Write an array to a file that appears complete or not at all."""

    def into(unfinished: Path) -> None:
        with unfinished.open("wb") as stream:
            np.save(stream, array)

    replace(file, into)


def replace(file: Path, into: Callable[[Path], object]) -> None:
    """Write next to the file, then move: runs that make equal scenes at one time do not disturb each other."""
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    into(unfinished)
    unfinished.replace(file)
