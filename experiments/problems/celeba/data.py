"""CelebA, or drawn faces in its layout, as batches of small images and 40 labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from balance.config import check_settings, setting
from experiments.datasets import image_cache
from experiments.datasets.faces import storage
from experiments.datasets.layouts import celeba
from experiments.problems.base import Splits, check_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

ON_DISK = "celeba"


@dataclass
class DataConfig:
    """Real images, or drawn ones, which show that everything runs and are no result."""

    source: str = setting("synthetic", choices=("synthetic", ON_DISK), help="drawn or real images; data.path implies celeba")
    path: str | None = setting(None, help="folder of CelebA, with Anno, Eval and Img")
    cache: str | None = setting(None, help="folder for decoded and drawn images; null: balance/celeba in the user's cache")
    workers: int | None = setting(None, minimum=1, help="processes that decode, once; null: one per core for many images")
    seed: int = setting(0, minimum=0, help="seed of the drawn images")
    train_images: int = setting(2000, minimum=1, help="number of drawn training images")
    validation_images: int = setting(500, minimum=1, help="number of drawn validation images")
    test_images: int = setting(500, minimum=1, help="number of drawn test images")


class Faces(Dataset[tuple[Tensor, ...]]):
    """Images (B, 3, 64, 64) in 0..1 and labels (B, 40), 0 or 1, both float32, by a list of indices.

    Args:
        file: File that `image_cache.decoded` has returned.
        count: Number of its images.
        rows: Images of this data set. Shape (N,).
        labels: Labels of these images. Shape (N, 40).
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
        return {key: value for key, value in vars(self).items() if key != "images"}  # a copy would contain all of them

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.images = image_cache.mapped(self.file, self.count)


def load(config: DataConfig) -> Splits:
    """Return the official splits of CelebA (162 770, 19 867, 19 962 images), or drawn images; decode them the first time.

    Args:
        config: Source of the images.

    Returns:
        Data sets of images and labels.
    """
    check_settings(config, "data")
    check_source(config.source, config.path, ON_DISK, "Anno, Eval and Img in it")
    cache = _default_cache() if config.cache is None else Path(config.cache).expanduser()
    if config.path is None:
        root = storage.cached(cache, (config.train_images, config.validation_images, config.test_images), config.seed)
    else:
        root = Path(config.path).expanduser()
    listing = celeba.read(root)
    file = image_cache.decoded(listing.folder, listing.names, (celeba.WIDTH, celeba.HEIGHT), cache, config.workers)
    count = len(listing.names)
    rows = [np.flatnonzero(listing.parts == part) for part in range(len(celeba.PARTS))]
    return Splits(*(Faces(file, count, part, listing.labels[part]) for part in rows))


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "balance" / "celeba"
