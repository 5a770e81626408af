"""CelebA, or drawn faces in its layout, as batches of small images and 40 labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.datasets import image_cache
from experiments.datasets.faces import storage
from experiments.datasets.layouts import celeba
from experiments.problems.base import Splits, check_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

ON_DISK = "celeba"


@dataclass
class DataConfig:
    """Which images, and where they are.

    Attributes:
        source: ``celeba``, which ``path`` implies on the command line: the real images; ``synthetic``: drawn ones, which show
            that everything runs and are no result.
        path: Folder of CelebA, with Anno, Eval and Img.
        cache: Folder for decoded and for drawn images; None: ``balance/celeba`` in the user's folder for caches.
        workers: Processes that decode, once; None: one for each core, if there are many images.
        seed: Of the drawn images.
        train_images: Number of drawn images, as those for validation and test.
    """

    source: Literal["synthetic", "celeba"] = "synthetic"
    path: str | None = None
    cache: str | None = None
    workers: int | None = None
    seed: int = 0
    train_images: int = 2000
    validation_images: int = 500
    test_images: int = 500


class Faces(Dataset[tuple[Tensor, ...]]):
    """Images (B, 3, 64, 64) in 0..1 and labels (B, 40), 0 or 1, both float32, by a list of indices.

    Args:
        file: As `image_cache.decoded` makes it.
        count: Number of its images.
        rows: Which of them are in this data set. Shape (N,).
        labels: Of these. Shape (N, 40).
    """

    def __init__(self, file: Path, count: int, rows: NDArray[np.intp], labels: NDArray[np.bool_]) -> None:
        self.file = file
        self.count = count
        self.rows = rows
        self.labels = torch.from_numpy(labels)
        self.images = image_cache.mapped(file, count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        images = np.asarray(self.images[self.rows[indices]])
        return torch.from_numpy(images).float().div_(255), self.labels[indices].float()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "images"}  # or all of them would be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.images = image_cache.mapped(self.file, self.count)


def load(config: DataConfig) -> Splits:
    """The official splits of CelebA (162 770, 19 867, 19 962 images), or drawn images. Decodes them at the first time.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an option does not fit, or a file is damaged.
        OSError: If the cache cannot be written to.
    """
    if config.workers is not None and config.workers < 1:
        raise ValueError(f"data.workers must be at least 1, but got {config.workers}.")
    folder = _default_cache() if config.cache is None else Path(config.cache).expanduser()
    listing = celeba.read(_root(config, folder))
    file = image_cache.decoded(listing.folder, listing.names, (celeba.WIDTH, celeba.HEIGHT), folder, config.workers)
    count = len(listing.names)
    rows = [np.flatnonzero(listing.parts == part) for part in range(len(celeba.PARTS))]
    return Splits(*(Faces(file, count, part, listing.labels[part]) for part in rows))


def _root(config: DataConfig, folder: Path) -> Path:
    """Folder of the data set; drawn images are written if they are not there."""
    if config.source not in ("synthetic", ON_DISK):
        raise ValueError(f"data.source must be synthetic or celeba, but got '{config.source}'.")
    check_source(config.source, config.path, ON_DISK, "Anno, Eval and Img in it")
    if config.path is not None:
        return Path(config.path).expanduser()
    return storage.cached(folder, (config.train_images, config.validation_images, config.test_images), config.seed)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "balance" / "celeba"
