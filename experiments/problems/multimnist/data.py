"""Pairs of digits on one canvas, of MNIST or of scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate, one_hot
from torch.utils.data import TensorDataset

from experiments.problems.base import Splits, check_source
from experiments.problems.multimnist import idx

if TYPE_CHECKING:
    from torch import Tensor

ON_DISK = "mnist"
PROTOCOLS = ("sound", "paper")
CLASSES = 10
MNIST_VALIDATION = 10_000
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
DIGITS_SPLIT = (1077, 360, 360)  # source images
DIGITS_REPEATS = (10, 4, 4)  # partners of each
_CHUNK = 10_000  # canvases that are resized at once


@dataclass
class DataConfig:
    """Where the digits come from, the seed of split and pairs, and what the losses are.

    Attributes:
        source: ``"digits"``, of scikit-learn, or ``"mnist"``, which ``path`` implies on the command line.
        path: Folder with the four files of MNIST, plain or with ``.gz``.
        protocol: Of MNIST. ``"sound"``: a sixth of the training images, chosen before they are paired, are for validation, and
            pixels are in 0..1 before they are normalised. ``"paper"``: the test pairs are for validation too, and the
            constants of 0..1 normalise pixels in 0..255, as the published code has it.
        imbalance: Factor of the loss of the right digit.
        label_smoothing: Of the cross-entropies.
        seed: Of split and pairs.
    """

    source: Literal["digits", "mnist"] = "digits"
    path: str | None = None
    protocol: str = "sound"
    imbalance: float = 1.0
    label_smoothing: float = 0.1
    seed: int = 0


def load(config: DataConfig) -> Splits:
    """Train, validation and test pairs: canvas, smoothed left label, smoothed right label, factor of the right loss.

    Raises:
        ValueError: If an option is out of range, or a file is not one of MNIST's.
        FileNotFoundError: If a file is missing.
    """
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"data.protocol must be one of {', '.join(PROTOCOLS)}, but got '{config.protocol}'.")
    check_source(config.source, config.path, ON_DISK, "the four files of MNIST")
    if config.protocol == "paper" and config.path is None:
        raise ValueError("protocol=paper is of MNIST: give data.path=FOLDER, the folder with its files.")
    if not config.imbalance > 0:
        raise ValueError(f"data.imbalance must be positive, but got {config.imbalance}.")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"data.label_smoothing must be in 0..1, 1 excluded, but got {config.label_smoothing}.")
    generator = torch.Generator().manual_seed(config.seed)
    made = digit_pairs(generator) if config.path is None else mnist_pairs(config.path, config.protocol, generator)
    sets = [
        TensorDataset(
            canvas,
            smoothed(left, config.label_smoothing),
            smoothed(right, config.label_smoothing),
            torch.full((len(canvas),), float(config.imbalance)),
        )
        for canvas, left, right in made
    ]
    if made[1] is made[2]:
        sets[1] = sets[2]
    return Splits(*sets)


def digit_pairs(generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Canvas (1, 10, 12), left and right label of the three splits, whose source images are disjoint."""
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32) / 16
    labels = torch.tensor(source.target)
    parts = torch.split(torch.randperm(len(labels), generator=generator), list(DIGITS_SPLIT))
    found = []
    for part, repeats in zip(parts, DIGITS_REPEATS, strict=True):
        left = part.repeat(repeats)
        right = torch.cat([part[torch.randperm(len(part), generator=generator)] for _ in range(repeats)])
        found.append((overlay(images[left], images[right], (10, 12), (2, 4)), labels[left], labels[right]))
    return found


def mnist_pairs(folder: str, protocol: str, generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Canvas (1, 28, 28), left and right label of the three splits."""
    train, test = idx.read(folder, "train"), idx.read(folder, "test")
    parts = [train, test]
    if protocol == "sound":
        order = torch.randperm(len(train.labels), generator=generator)
        held_out = min(MNIST_VALIDATION, max(1, len(order) // 6))
        if held_out == len(order):
            raise ValueError(f"{folder} must have at least two training images, one for validation, but has {len(order)}.")
        parts = [idx.Digits(train.images[rows], train.labels[rows]) for rows in (order[held_out:], order[:held_out])] + [test]
    found = [mnist_canvases(part, protocol, generator) for part in parts]
    return [found[0], found[1], found[-1]]


def mnist_canvases(digits: idx.Digits, protocol: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Every image with a partner drawn at random, on 36 x 36 pixels made smaller by bicubic filtering, normalised.

    Args:
        digits: N source images.
        protocol: ``"paper"`` normalises pixels in 0..255 with the mean and deviation of pixels in 0..1.
        generator: Draws the partners, of which each can be the image itself.

    Returns:
        Shapes (N, 1, 28, 28), (N,), (N,).
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
    canvas = torch.cat(chunks) / (255 if protocol == "sound" else 1)
    return (canvas - MNIST_MEAN) / MNIST_DEVIATION, digits.labels, digits.labels[partners]


def overlay(left: Tensor, right: Tensor, canvas: tuple[int, int], offset: tuple[int, int]) -> Tensor:
    """The left images in the upper left corner, the right ones moved by ``offset``, and of both the maximum.

    Args:
        left: Shape (N, rows, columns), not negative.
        right: Like ``left``.
        canvas: Rows and columns of the result.
        offset: Rows and columns by which the right images are moved.

    Returns:
        Shape (N, 1, *canvas).
    """
    rows, columns = left.shape[1:]
    down, across = offset
    found = left.new_zeros(len(left), 1, *canvas)
    found[:, 0, :rows, :columns] = left
    corner = found[:, 0, down : down + rows, across : across + columns]
    corner.copy_(torch.maximum(corner, right))
    return found


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    """Label smoothing: 1 - s on the label, and s spread over all classes. Shape (N,) -> (N, 10)."""
    return (1 - smoothing) * one_hot(labels, CLASSES).float() + smoothing / CLASSES
