"""Pairs of handwritten digits on one canvas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from balance.config import check_settings, setting
from experiments.problems.base import Splits

CANVAS = 12
SIDE = 8


@dataclass
class DataConfig:
    """Random pairs of source images.

    Without noise the network soon fits the 1077 source images of the training split exactly. A loss of exactly zero ends every
    method that takes its logarithm or divides by it.
    """

    seed: int = setting(0, minimum=0, help="seed of the split, of the pairs and of the noise")
    noise: float = setting(0.25, minimum=0, help="deviation of Gaussian noise on training images, with pixels in 0..1")
    train_pairs: int = setting(6000, minimum=1, help="number of training pairs")
    validation_pairs: int = setting(1000, minimum=1, help="number of validation pairs")
    test_pairs: int = setting(1000, minimum=1, help="number of test pairs")


def load(config: DataConfig) -> Splits:
    """Return train, validation and test pairs. The 1797 source images are split 60 : 20 : 20, by class, before pairing.

    Args:
        config: Size and seed of the data.

    Returns:
        Data sets of canvas, left label, right label and clean left digit, see `pair`.
    """
    check_settings(config, "data")
    sizes = (config.train_pairs, config.validation_pairs, config.test_pairs)
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32) / 16
    labels = torch.tensor(source.target)
    generator = torch.Generator().manual_seed(config.seed)
    pairs = [pair(images[part], labels[part], n, generator) for part, n in zip(parts(labels, config.seed), sizes, strict=True)]
    return Splits(Noisy(pairs[0], config.noise, generator), *pairs[1:])


class Noisy(Dataset[tuple[Tensor, ...]]):
    """Pairs whose canvas gets Gaussian noise, drawn again for every batch."""

    def __init__(self, pairs: TensorDataset, deviation: float, generator: torch.Generator) -> None:
        self.pairs = pairs
        self.deviation = deviation
        self.generator = generator

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        canvas, *rest = self.pairs[indices]
        return canvas + self.deviation * torch.randn(canvas.shape, generator=self.generator), *rest


def parts(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the source images of the three splits, disjoint, with equal shares of every class."""
    everything = torch.arange(len(labels)).numpy()
    train, rest = train_test_split(everything, test_size=0.4, random_state=seed, stratify=labels.numpy())
    validation, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest].numpy())
    return torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test)


def pair(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> TensorDataset:
    """Draw random pairs of different images.

    Args:
        images: Source digits, pixels in 0..1. Shape (N, 8, 8).
        labels: Shape (N,).
        count: Number of pairs.
        generator: Random generator of the pairs.

    Returns:
        Canvas (1, 12, 12), left label, right label, clean left digit (64,) of each pair.
    """
    left = torch.randint(len(images), (count,), generator=generator)
    right = (left + torch.randint(1, len(images), (count,), generator=generator)) % len(images)
    canvas = torch.zeros(count, 1, CANVAS, CANVAS)
    canvas[:, 0, :SIDE, :SIDE] = images[left]
    corner = canvas[:, 0, -SIDE:, -SIDE:]
    corner.copy_(torch.maximum(corner, images[right]))
    return TensorDataset(canvas, labels[left], labels[right], images[left].flatten(1))
