"""Pairs of digits on one canvas, from MNIST or from scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate, one_hot
from torch.utils.data import TensorDataset

from balance.config import check_settings, setting
from experiments.problems.base import PROTOCOLS, ProtocolName, Splits, check_source
from experiments.problems.multimnist import idx

if TYPE_CHECKING:
    from torch import Tensor

ON_DISK = "mnist"
CLASSES = 10
MNIST_VALIDATION = 10_000
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
DIGITS_SPLIT = (1077, 360, 360)  # source images
DIGITS_REPEATS = (10, 4, 4)  # partners of each source image
_CHUNK = 10_000  # canvases that are resized at once


@dataclass
class DataConfig:
    """Pairs of digits, and the definition of their losses.

    The protocol applies to MNIST. ``sound``: a sixth of the training images, chosen before pairing, are for validation, and
    pixels are in 0..1 before they are normalised. ``paper``: the test pairs are for validation too, and the constants of 0..1
    normalise pixels in 0..255, as in the published code.
    """

    source: str = setting("digits", choices=("digits", ON_DISK), help="scikit-learn or MNIST; data.path implies mnist")
    path: str | None = setting(None, help="folder with the four files of MNIST, plain or with .gz")
    protocol: ProtocolName = setting("sound", choices=PROTOCOLS, help="splits and pixels of MNIST: sound, or as published")
    imbalance: float = setting(1.0, above=0, help="factor of the loss of the right digit")
    label_smoothing: float = setting(0.1, minimum=0, below=1, help="label smoothing of the cross-entropies")
    seed: int = setting(0, minimum=0, help="seed of split and pairs")


class Pairs(NamedTuple):
    """N pairs of digits."""

    canvases: Tensor  # (N, 1, rows, columns)
    left: Tensor  # labels (N,)
    right: Tensor  # labels (N,)


def load(config: DataConfig) -> Splits:
    """Return train, validation and test pairs: canvas, smoothed left label, smoothed right label, factor of the right loss.

    Args:
        config: Source of the digits, and the losses.

    Returns:
        The three splits; validation and test are one data set with ``protocol: paper``.

    Raises:
        ValueError: If an option is out of range, or protocol and source do not fit.
    """
    check_settings(config, "data")
    check_source(config.source, config.path, ON_DISK, "the four files of MNIST")
    if config.protocol == "paper" and config.path is None:
        raise ValueError("protocol must be sound for scikit-learn's digits, but got paper. Set data.path=FOLDER for MNIST.")
    generator = torch.Generator().manual_seed(config.seed)
    splits = digit_pairs(generator) if config.path is None else mnist_pairs(config.path, config.protocol, generator)
    sets = [data_set(pairs, config) for pairs in splits]
    if splits[1] is splits[2]:
        sets[1] = sets[2]
    return Splits(*sets)


def data_set(pairs: Pairs, config: DataConfig) -> TensorDataset:
    """Return pairs with smoothed labels and the factor of the right loss."""
    left, right = (smoothed(labels, config.label_smoothing) for labels in pairs[1:])
    return TensorDataset(pairs.canvases, left, right, torch.full((len(left),), float(config.imbalance)))


def digit_pairs(generator: torch.Generator) -> list[Pairs]:
    """Return the three splits of scikit-learn's digits, whose source images are disjoint, on 10 x 12 pixels."""
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32) / 16
    labels = torch.tensor(source.target)
    parts = torch.split(torch.randperm(len(labels), generator=generator), list(DIGITS_SPLIT))
    splits = []
    for part, repeats in zip(parts, DIGITS_REPEATS, strict=True):
        left = part.repeat(repeats)
        right = torch.cat([part[torch.randperm(len(part), generator=generator)] for _ in range(repeats)])
        splits.append(Pairs(overlay(images[left], images[right], (10, 12), (2, 4)), labels[left], labels[right]))
    return splits


def mnist_pairs(folder: str, protocol: ProtocolName, generator: torch.Generator) -> list[Pairs]:
    """Return the three splits of MNIST, on 28 x 28 pixels.

    Args:
        folder: Folder of MNIST.
        protocol: ``"sound"`` or ``"paper"``, see `DataConfig`.
        generator: Random generator of the split and of the pairs.

    Returns:
        The splits.

    Raises:
        ValueError: If there are too few training images.
    """
    train, test = idx.read(folder, "train"), idx.read(folder, "test")
    parts = [train, test]
    if protocol == "sound":
        order = torch.randperm(len(train.labels), generator=generator)
        held_out = min(MNIST_VALIDATION, max(1, len(order) // 6))
        if held_out == len(order):
            raise ValueError(f"{folder} must have at least two training images, one for validation, but has {len(order)}.")
        parts = [idx.Digits(train.images[rows], train.labels[rows]) for rows in (order[held_out:], order[:held_out])] + [test]
    splits = [mnist_canvases(part, protocol, generator) for part in parts]
    return [splits[0], splits[1], splits[-1]]


def mnist_canvases(digits: idx.Digits, protocol: ProtocolName, generator: torch.Generator) -> Pairs:
    """Pair every image with a random partner, on 36 x 36 pixels that bicubic filtering shrinks to 28 x 28; normalise.

    Args:
        digits: N source images.
        protocol: ``"paper"`` normalises pixels in 0..255 with the mean and deviation of pixels in 0..1.
        generator: Random generator of the partners; an image can be its own partner.

    Returns:
        N pairs, with canvases (N, 1, 28, 28).
    """
    partners = torch.randint(len(digits.labels), (len(digits.labels),), generator=generator)
    chunks = [
        interpolate(
            overlay(digits.images[rows].float(), digits.images[partners[rows]].float(), (36, 36), (6, 6)),
            size=(28, 28),
            mode="bicubic",
            antialias=True,
        )
        for rows in torch.split(torch.arange(len(partners)), _CHUNK)
    ]
    canvases = torch.cat(chunks) / (255 if protocol == "sound" else 1)
    return Pairs((canvases - MNIST_MEAN) / MNIST_DEVIATION, digits.labels, digits.labels[partners])


def overlay(left: Tensor, right: Tensor, canvas: tuple[int, int], offset: tuple[int, int]) -> Tensor:
    """Combine left images, in the upper left corner, and right images, moved by ``offset``, by their maximum.

    Args:
        left: Shape (N, rows, columns), not negative.
        right: Shape (N, rows, columns), not negative.
        canvas: Rows and columns of the result.
        offset: Rows and columns by which the right images are moved.

    Returns:
        Shape (N, 1, *canvas).
    """
    rows, columns = left.shape[1:]
    down, across = offset
    canvases = left.new_zeros(len(left), 1, *canvas)
    canvases[:, 0, :rows, :columns] = left
    corner = canvases[:, 0, down : down + rows, across : across + columns]
    corner.copy_(torch.maximum(corner, right))
    return canvases


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    """Return label smoothing: 1 - s on the label, and s spread over all classes. Shape (N,) -> (N, 10)."""
    return (1 - smoothing) * one_hot(labels, CLASSES).float() + smoothing / CLASSES
