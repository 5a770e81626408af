"""Scenes as arrays in memory and as folders in the layouts of NYUv2 and CityScapes.

    FOLDER/scenes.json                                       what is in the folder
    FOLDER/{train,val,test}/{image,label,depth,normal}/{i}.npy   nyuv2
    FOLDER/{train,val,test}/{image,label_7,depth}/{i}.npy        cityscapes

The archives themselves have train and val alone, and their val is the test set.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from balance.messages import unknown
from experiments.datasets.rooms.rendering import Sample, render
from experiments.datasets.rooms.room import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Files = dict[str, NDArray[np.float32]]  # arrays by the name of their folder

FIRST_SEED = {"train": 0, "val": 10_000, "test": 20_000}
LARGEST_SPLIT = 10_000  # so that no two splits have a scene in common
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
INVERSE_DEPTH = 0.2  # metres: what is divided by the depth, so that, as in CityScapes, the result is below 0.4922


def nyuv2(sample: Sample) -> Files:
    """Arrays by folder; labels are float32, as the augmentation of the official code needs them."""
    return sample._asdict()


def cityscapes(sample: Sample) -> Files:
    """Arrays by folder: labels in the order of `MERGED`, and `INVERSE_DEPTH` over depth, where 0 = unknown as well."""
    merged = np.array([next(i for i, names in enumerate(MERGED.values()) if name in names) for name in CLASSES])
    label = np.where(sample.label < 0, -1, merged[sample.label.astype(int)]).astype(np.float32)
    known = sample.depth > 0
    inverse = np.where(known, INVERSE_DEPTH / np.where(known, sample.depth, 1), 0).astype(np.float32)
    return {"image": sample.image, "label_7": label, "depth": inverse}


LAYOUTS: dict[str, Callable[[Sample], Files]] = {"nyuv2": nyuv2, "cityscapes": cityscapes}


def seeds(split: str, count: int) -> range:
    """Seeds of the first scenes of a split.

    Args:
        split: train, val (for validation) or test.
        count: How many, at most `LARGEST_SPLIT`.

    Raises:
        ValueError: If there is no such split, or it has not that many scenes.
    """
    if split not in FIRST_SEED:
        raise ValueError(unknown("split", split, FIRST_SEED))
    if not 1 <= count <= LARGEST_SPLIT:
        raise ValueError(f"A split has 1 to {LARGEST_SPLIT} scenes, but {count} were asked of '{split}'.")
    return range(FIRST_SEED[split], FIRST_SEED[split] + count)


def arrays(split: str, count: int, *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> Files:
    """The first scenes of a split in memory, by the name of the folder that they have on disk. Shapes (count, H, W, ...)."""
    convert = converter(layout, height, width)
    scenes = [convert(render(seed, height, width)) for seed in seeds(split, count)]
    return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}


def write(folder: Path | str, counts: Mapping[str, int], *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> int:
    """Write the first scenes of each split in the layout of a data set, as far as they are not there already.

    Every file appears at once and complete, so that an interrupted call can be repeated, and several may run at a time.

    Args:
        folder: Where; it is made if it is not there.
        counts: Number of scenes by split, of train, val (for validation) and test.
        layout: nyuv2 or cityscapes.
        height: Pixels.
        width: Pixels.

    Returns:
        How many scenes were rendered.

    Raises:
        ValueError: If an argument is out of range, or the folder has something else in it.
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
        for part in parts.values():
            part.mkdir(parents=True, exist_ok=True)
        there = set.intersection(*({file.name for file in part.iterdir()} for part in parts.values()))
        for i, seed in enumerate(scenes):
            if f"{i}.npy" not in there:
                for name, array in convert(render(seed, height, width)).items():
                    save(parts[name] / f"{i}.npy", array)
                rendered += 1
    return rendered


def cached(root: Path | str, counts: Mapping[str, int], *, layout: str = "nyuv2", height: int = 72, width: int = 96) -> Path:
    """The folder, below ``root``, of scenes that were written once; see `write`.

    Its name tells the layout, the size and the version of the generator: a change of its source starts a new folder.
    """
    folder = Path(root).expanduser() / f"{layout}-{height}x{width}-{version()}"
    write(folder, counts, layout=layout, height=height, width=width)
    return folder


def converter(layout: str, height: int, width: int) -> Callable[[Sample], Files]:
    """From a sample to the files of a layout.

    Raises:
        ValueError: If there is no such layout, or nothing would be left within the border.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown("layout", layout, LAYOUTS))
    if min(height, width) < 16:
        raise ValueError(f"Scenes must have at least 16 x 16 pixels, but got {height} x {width}.")
    return LAYOUTS[layout]


def version() -> str:
    """Short hash of the source of the generator."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in ("rays", "rendering", "room", "storage")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def note(layout: str, height: int, width: int) -> dict[str, Any]:
    """What is in a folder, so that nothing else is mixed with it."""
    return {"layout": layout, "height": height, "width": width, "version": version()}


def claim(folder: Path, content: dict[str, Any]) -> None:
    """Make the folder and leave the note in it.

    Raises:
        ValueError: If the folder has something else in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]  # before the note, which comes first
    file = folder / NOTE
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != content:
            raise ValueError(f"{folder} has other scenes in it: {found}, not {content}. Choose another folder, or remove it.")
    elif others:
        raise ValueError(f"{folder} has something else than scenes in it. Choose another folder.")
    else:
        replace(file, lambda unfinished: unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8"))


def save(file: Path, array: NDArray[np.float32]) -> None:
    """Write an array to a file that is there as a whole or not at all."""

    def into(unfinished: Path) -> None:
        with unfinished.open("wb") as stream:
            np.save(stream, array)

    replace(file, into)


def replace(file: Path, into: Callable[[Path], object]) -> None:
    """Write beside the file, then move: runs that make the same scenes at the same time do not disturb each other."""
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    into(unfinished)
    unfinished.replace(file)
