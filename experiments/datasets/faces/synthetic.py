"""Drawn faces in the files of CelebA, so that everything runs without CelebA. Never report numbers of them as results.

Attributes are drawn independently, at about the rates of CelebA's training images; colours of hair exclude one another, as do
its forms. So no attribute can be guessed from another one: each must be seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from experiments.datasets import image_cache
from experiments.datasets.faces import faces, layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Share of positive images in CelebA, in percent, in the order of its attributes
PERCENT = (
    *(11, 27, 51, 20, 2, 15, 24, 23, 24, 15, 5, 20, 14, 6, 5, 6, 6, 4, 39, 45),
    *(42, 48, 4, 12, 83, 28, 4, 28, 8, 7, 6, 48, 21, 32, 19, 5, 47, 12, 7, 77),
)
EXCLUSIVE = (("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"), ("Straight_Hair", "Wavy_Hair"))
CHUNK = 32  # images that are drawn at a time, few enough for the cache


def attributes(count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Random attributes. Shape (N, 40)."""
    rates = np.array(PERCENT) / 100
    drawn = generator.random((count, len(rates))) < rates
    for group in EXCLUSIVE:
        members = [layout.ATTRIBUTES.index(name) for name in group]
        which = np.searchsorted(np.cumsum(rates[members]), generator.random(count), side="right")
        drawn[:, members] = which[:, None] == np.arange(len(members))
    return drawn


def written(folder: Path, sizes: tuple[int, int, int], seed: int) -> Path:
    """Folder of a data set of drawn faces; the faces are drawn if they are not there.

    Args:
        folder: Where such data sets are kept.
        sizes: Number of images for train, validation and test.
        seed: Decides everything that is drawn.

    Raises:
        ValueError: If a part would be empty.
        OSError: If ``folder`` cannot be written to.
    """
    if min(sizes) < 1:
        raise ValueError(f"data: every split must have at least one image, but got {sizes}.")
    drawing = b"".join(
        Path(module).read_bytes() for module in (__file__, faces.__file__)
    )  # another drawing is another data set
    name = "-".join(("synthetic", *map(str, (seed, *sizes)), hashlib.sha256(drawing).hexdigest()[:12]))
    target = folder / name
    images = target.joinpath(*layout.IMAGES)
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
    files = layout.write(root, labels, parts)
    for start in range(0, len(files), CHUNK):
        images = faces.draw(labels[start : start + CHUNK], generator)
        for file, pixels in zip(files[start:], images, strict=False):
            image = Image.fromarray(pixels).resize((layout.WIDTH, layout.HEIGHT), Image.Resampling.BILINEAR)
            image.save(file, quality=90)
