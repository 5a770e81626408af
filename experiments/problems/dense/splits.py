"""Train, validation and test data of dense prediction, from the files of the data set or from procedural scenes."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from balance.config import check_settings, setting
from experiments.datasets.rooms.storage import cached
from experiments.problems.base import PROTOCOLS, ProtocolName, Splits, check_source
from experiments.problems.dense.augmentation import Augmented
from experiments.problems.dense.files import Files, count

if TYPE_CHECKING:
    from experiments.datasets.layouts.dense import Layout

ON_DISK = "files"
VALIDATION_SHARE = 0.1  # of the training files, where the data set has no validation files
VALIDATION_SEED = 0  # of their choice, which is the same in all runs


@dataclass
class DenseDataConfig:
    """The data, and the part of it that is used.

    ``source: files`` reads the data set in the folder ``path``. That has train and val in it, and val is the test set. With
    ``protocol: sound``, a tenth of the training files, chosen once for all runs, is kept for validation. If the folder has test
    as well, then val is the validation set. With ``protocol: paper``, as in the official codes, all training files are trained
    on, and the test set is the validation set too.

    ``source: scenes`` renders procedural scenes once, into the folder ``cache``, and reads them in the same way. They have
    separate validation scenes. `Scenes` has their default size and number.
    """

    source: str = setting("scenes", choices=("scenes", ON_DISK), help="scenes or the data set; data.path implies files")
    path: str | None = setting(None, help="folder of the data set, with train and val in it")
    cache: str | None = setting(None, help="folder for rendered scenes; null: in the directory for temporary files")
    protocol: ProtocolName = setting("sound", choices=PROTOCOLS, help="splits: sound, or as in the published codes")
    num_train: int | None = setting(None, minimum=1, help="number of training samples; null: all files, or 240 scenes")
    num_validation: int | None = setting(None, minimum=1, help="number of validation samples; null: all files, or 60 scenes")
    num_test: int | None = setting(None, minimum=1, help="number of test samples; null: all files, or 60 scenes")
    height: int | None = setting(None, minimum=1, help="height of scenes, and required height of files")
    width: int | None = setting(None, minimum=1, help="width of scenes, and required width of files")
    augment: bool = setting(default=True, help="scaled crops and mirroring of training images")
    seed: int = setting(0, minimum=0, help="seed of the augmentation")


class Scenes(NamedTuple):
    """Defaults for scenes. The official networks halve sides five times, which multiples of 32 pixels allow."""

    height: int
    width: int
    num_train: int = 240
    num_validation: int = 60
    num_test: int = 60


class Samples(NamedTuple):
    """Samples of a split: the folder that they are in, and their numbers."""

    folder: Path
    numbers: list[int]

    def files(self, layout: Layout, size: tuple[int, int] | None) -> Files:
        """Return the data set of the samples."""
        return Files(self.folder, layout, self.numbers, size)

    def first(self, number: int | None, key: str) -> Samples:
        """Return the first samples.

        Args:
            number: Number of samples; None for all.
            key: Entry of the configuration, for the message.

        Returns:
            The samples.

        Raises:
            ValueError: If there are fewer samples.
        """
        if number is not None and number > len(self.numbers):
            raise ValueError(f"data.{key} must be at most {len(self.numbers)}, the number of files, but got {number}.")
        return self._replace(numbers=self.numbers[:number])


class Selection(NamedTuple):
    """Samples of the three splits."""

    train: Samples
    validation: Samples
    test: Samples


def load_dense(config: DenseDataConfig, layout: Layout, scenes: Scenes) -> Splits:
    """Return data sets whose items, for a list of indices, are batches ``(image, label, depth[, normal])``; see `Files`.

    Args:
        config: Source and size of the data.
        layout: Layout of the data set.
        scenes: Defaults for scenes.

    Returns:
        The three splits; validation and test are one data set if they have the same samples.

    Raises:
        ValueError: If an entry is out of range, or a file is missing or damaged.
    """
    check_settings(config, "data")
    check_source(config.source, config.path, ON_DISK, "train and val in it")
    if config.source == ON_DISK and (config.height is None) != (config.width is None):
        raise ValueError(f"Give both data.height and data.width, or none, but got {config.height} and {config.width}.")
    selection = of_scenes(config, layout, scenes) if config.source == "scenes" else of_files(config, layout)
    train = selection.train.files(layout, given_size(config, scenes))
    test = selection.test.files(layout, train.size)
    validation = test if selection.validation == selection.test else selection.validation.files(layout, train.size)
    if not config.augment:
        return Splits(train, validation, test)
    multiply = layout.inverse_depth and config.protocol == "sound"
    return Splits(Augmented(train, config.seed, multiply=multiply), validation, test)


def given_size(config: DenseDataConfig, scenes: Scenes) -> tuple[int, int] | None:
    """Return the (H, W) of scenes, or the required (H, W) of files, if any."""
    if config.source == "scenes":
        return config.height or scenes.height, config.width or scenes.width
    return None if config.height is None or config.width is None else (config.height, config.width)


def of_scenes(config: DenseDataConfig, layout: Layout, scenes: Scenes) -> Selection:
    """Select scenes, after rendering those that the cache lacks. One cache serves runs with any numbers.

    Args:
        config: Size of the data, and the cache.
        layout: Layout of the scenes on disk.
        scenes: Defaults.

    Returns:
        The first scenes of each split.

    Raises:
        OSError: If the cache cannot be written.
    """
    counts = {
        "train": config.num_train or scenes.num_train,
        "val": config.num_validation or scenes.num_validation,
        "test": config.num_test or scenes.num_test,
    }
    root = Path(config.cache) if config.cache is not None else default_cache()
    height, width = config.height or scenes.height, config.width or scenes.width
    try:
        folder = cached(root, counts, layout=layout.name, height=height, width=width)
    except OSError as error:
        raise OSError(
            f"data.cache: cannot write to {root} ({error.strerror}). Choose another with data.cache=FOLDER."
        ) from None
    train, val, test = (Samples(folder / split, list(range(number))) for split, number in counts.items())
    return Selection(train, test if config.protocol == "paper" else val, test)


def default_cache() -> Path:
    """Return a folder of this user for scenes, kept between runs."""
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows has no numbers of users
    return Path(tempfile.gettempdir()) / f"balance-scenes-{user}"


def of_files(config: DenseDataConfig, layout: Layout) -> Selection:
    """Select files of the data set; the protocol decides on validation.

    Args:
        config: Folder and size of the data.
        layout: Layout of the data set.

    Returns:
        Files of each split.
    """
    folder = Path(str(config.path)).expanduser()
    splits = ("train", "val", "test") if (folder / "test").is_dir() else ("train", "val")
    train, val, *rest = (Samples(folder / split, list(range(count(folder / split, layout)))) for split in splits)
    test = rest[0] if rest else val
    if config.protocol == "paper":
        validation = test
    else:
        train, validation = (train, val) if rest else held_out(train, config.num_validation)
        validation = validation.first(config.num_validation, "num_validation")
    return Selection(train.first(config.num_train, "num_train"), validation, test.first(config.num_test, "num_test"))


def held_out(train: Samples, number: int | None) -> tuple[Samples, Samples]:
    """Split training files into files for training and files for validation.

    Args:
        train: All training files.
        number: Number of files for validation; None for a tenth.

    Returns:
        Files for training, and files for validation.

    Raises:
        ValueError: If no file is left for training.
    """
    total = len(train.numbers)
    size = number or max(1, round(VALIDATION_SHARE * total))
    if size >= total:
        raise ValueError(f"data.num_validation must leave some of the {total} training files, but got {size}.")
    order = np.random.default_rng(VALIDATION_SEED).permutation(total).tolist()
    return train._replace(numbers=sorted(order[size:])), train._replace(numbers=sorted(order[:size]))
