"""Train, validation and test data of the experiments on images, from the files of the data set or from procedural scenes."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from experiments.datasets.rooms.storage import cached
from experiments.problems.base import Splits, check_source
from experiments.problems.dense.augmentation import Augmented
from experiments.problems.dense.files import Files, count

if TYPE_CHECKING:
    from experiments.datasets.layouts.dense import Layout

ON_DISK = "files"
VALIDATION_SHARE = 0.1  # of the training files, where the data set has no validation files
VALIDATION_SEED = 0  # of their choice, which is the same in all runs


@dataclass
class DenseDataConfig:
    """Where the data comes from, and how much of it is used.

    ``source: files``, which ``path`` implies on the command line, reads the data set in the folder ``path``. That has train and
    val in it, and val is the test set. With ``protocol: sound``, a tenth of the training files, the same in all runs, is set
    aside for validation; if the folder has test beside train and val, then val is the validation set. With ``protocol: paper``,
    as in the official codes, all training files are trained on, and the test set is the validation set as well.

    ``source: scenes`` renders procedural scenes once, into the folder ``cache`` (by default in the directory for temporary
    files), and reads them in the same way. They have validation scenes of their own.

    The numbers say how many samples each split has; by default, all files, or 240 + 60 + 60 scenes. Height and width are those
    of the scenes, and what the files must have if they are given. The seed decides on the augmentation.
    """

    source: Literal["scenes", "files"] = "scenes"
    path: str | None = None
    cache: str | None = None
    protocol: Literal["sound", "paper"] = "sound"
    num_train: int | None = None
    num_validation: int | None = None
    num_test: int | None = None
    height: int | None = None
    width: int | None = None
    augment: bool = True
    seed: int = 0


class Scenes(NamedTuple):
    """Defaults for scenes. Sides that are multiples of 32 pixels can be halved five times, which the official networks do."""

    height: int
    width: int
    num_train: int = 240
    num_validation: int = 60
    num_test: int = 60


class Chosen(NamedTuple):
    """Folder and numbers of the samples of each split."""

    train: tuple[str, list[int]]
    validation: tuple[str, list[int]]
    test: tuple[str, list[int]]


def load_dense(config: DenseDataConfig, layout: Layout, scenes: Scenes) -> Splits:
    """Data sets whose items, for a list of indices, are batches ``(image, label, depth[, normal])``; see `Files`.

    Raises:
        ValueError: If an entry is out of range, or a file is missing or damaged.
        OSError: If the cache cannot be written.
    """
    check(config)
    if config.source == "scenes":
        folder, chosen, size = of_scenes(config, layout, scenes)
    else:
        folder, chosen, size = *of_files(config, layout), None
        if config.height is not None and config.width is not None:
            size = (config.height, config.width)
    train = Files(folder / chosen.train[0], layout, chosen.train[1], size)
    test = Files(folder / chosen.test[0], layout, chosen.test[1], train.size)
    validation = test
    if chosen.validation != chosen.test:
        validation = Files(folder / chosen.validation[0], layout, chosen.validation[1], train.size)
    if not config.augment:
        return Splits(train, validation, test)
    multiply = layout.inverse_depth and config.protocol == "sound"
    return Splits(Augmented(train, config.seed, multiply=multiply), validation, test)


def check(config: DenseDataConfig) -> None:
    """Entries that contradict each other or are out of range are errors."""
    check_source(config.source, config.path, ON_DISK, "train and val in it")
    if config.source == "files" and (config.height is None) != (config.width is None):
        raise ValueError(f"Give both data.height and data.width, or none, but got {config.height} and {config.width}.")
    for key in ("num_train", "num_validation", "num_test", "height", "width"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ValueError(f"data.{key} must be at least 1, but got {value}.")
    if config.seed < 0:
        raise ValueError(f"data.seed must not be negative, but got {config.seed}.")


def of_scenes(config: DenseDataConfig, layout: Layout, scenes: Scenes) -> tuple[Path, Chosen, tuple[int, int]]:
    """Scenes, which are rendered as far as the cache does not have them. One cache serves runs with any numbers."""
    train, validation, test = (getattr(config, key) or getattr(scenes, key) for key in scenes._fields[2:])
    height, width = config.height or scenes.height, config.width or scenes.width
    root = Path(config.cache) if config.cache is not None else default_cache()
    counts = {"train": train, "val": validation, "test": test}
    try:
        folder = cached(root, counts, layout=layout.name, height=height, width=width)
    except OSError as error:
        raise OSError(
            f"data.cache: cannot write to {root} ({error.strerror}). Choose another with data.cache=FOLDER."
        ) from None
    chosen = {split: (split, list(range(number))) for split, number in counts.items()}
    validation_of = chosen["test" if config.protocol == "paper" else "val"]
    return folder, Chosen(chosen["train"], validation_of, chosen["test"]), (height, width)


def default_cache() -> Path:
    """A folder of this user for scenes, kept between runs."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"balance-scenes-{user}"


def of_files(config: DenseDataConfig, layout: Layout) -> tuple[Path, Chosen]:
    """Files of the data set; validation as the protocol says."""
    folder = Path(str(config.path)).expanduser()
    train = ("train", list(range(count(folder / "train", layout))))
    val = ("val", list(range(count(folder / "val", layout))))
    own = (folder / "test").is_dir()
    test = ("test", list(range(count(folder / "test", layout)))) if own else val
    if config.protocol == "paper":
        validation = test
    elif own:
        validation = val
    else:
        held_out = config.num_validation or max(1, round(VALIDATION_SHARE * len(train[1])))
        if held_out >= len(train[1]):
            raise ValueError(f"data.num_validation must leave some of the {len(train[1])} training files, but got {held_out}.")
        order = np.random.default_rng(VALIDATION_SEED).permutation(len(train[1])).tolist()
        train, validation = ("train", sorted(order[held_out:])), ("train", sorted(order[:held_out]))
    return folder, Chosen(
        first(train, config.num_train, "num_train"),
        validation if config.protocol == "paper" else first(validation, config.num_validation, "num_validation"),
        first(test, config.num_test, "num_test"),
    )


def first(samples: tuple[str, list[int]], number: int | None, key: str) -> tuple[str, list[int]]:
    """So many of the samples of a split, or all."""
    split, numbers = samples
    if number is not None and number > len(numbers):
        raise ValueError(f"data.{key} must be at most {len(numbers)}, the number of files, but got {number}.")
    return split, numbers[:number]
