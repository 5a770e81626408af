"""Drawn faces in the layout of CelebA, so that everything runs without CelebA. Never report numbers of them as results.

Attributes are drawn independently, at about the rates of CelebA's training images; colours of hair exclude one another, and so
do its forms. So no attribute can be guessed from another one: each must be seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from experiments.datasets import image_cache
from experiments.datasets.faces import drawing
from experiments.datasets.layouts import celeba

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Share of positive images in CelebA, in percent, in the order of its attributes
PERCENT = (
    *(11, 27, 51, 20, 2, 15, 24, 23, 24, 15, 5, 20, 14, 6, 5, 6, 6, 4, 39, 45),
    *(42, 48, 4, 12, 83, 28, 4, 28, 8, 7, 6, 48, 21, 32, 19, 5, 47, 12, 7, 77),
)
EXCLUSIVE = (("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"), ("Straight_Hair", "Wavy_Hair"))
CHUNK = 32  # images that are drawn at a time, few enough for the processor's cache


def attributes(count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Draw random attributes. Shape (N, 40)."""
    rates = np.array(PERCENT) / 100
    drawn = generator.random((count, len(rates))) < rates
    for group in EXCLUSIVE:
        members = [celeba.ATTRIBUTES.index(name) for name in group]
        which = np.searchsorted(np.cumsum(rates[members]), generator.random(count), side="right")
        drawn[:, members] = which[:, None] == np.arange(len(members))
    return drawn


def cached(folder: Path, sizes: tuple[int, int, int], seed: int) -> Path:
    """Return the folder of a data set of drawn faces; draw the faces if they do not exist.

    Its name contains the version of the drawing: a change of its source starts a new folder.

    Args:
        folder: Parent of such folders.
        sizes: Number of images for train, validation and test.
        seed: Seed of attributes and faces.

    Returns:
        The folder, in the layout of CelebA.

    Raises:
        OSError: If ``folder`` cannot be written.
    """
    sources = b"".join(Path(module).read_bytes() for module in (__file__, drawing.__file__))
    name = "-".join(("synthetic", *map(str, (seed, *sizes)), hashlib.sha256(sources).hexdigest()[:12]))
    target = folder / name
    images = target.joinpath(*celeba.IMAGES)
    image_cache.build_once(
        target,
        lambda: images.is_dir() and len(list(images.iterdir())) == sum(sizes),
        lambda partial: _write(partial, sizes, seed),
    )
    return target


def _write(root: Path, sizes: tuple[int, int, int], seed: int) -> None:
    root.mkdir()
    generator = np.random.default_rng(seed)
    labels = attributes(sum(sizes), generator)
    parts = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    files = celeba.write(root, labels, parts)
    for start in range(0, len(files), CHUNK):
        faces = drawing.draw(labels[start : start + CHUNK], generator)
        for file, pixels in zip(files[start:], faces, strict=False):
            image = Image.fromarray(pixels).resize((celeba.WIDTH, celeba.HEIGHT), Image.Resampling.BILINEAR)
            image.save(file, quality=90)
