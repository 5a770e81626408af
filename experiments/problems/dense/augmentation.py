"""Scale-crop and mirroring of training images, as the official codes for NYUv2 and CityScapes do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from experiments.problems.base import Batch

if TYPE_CHECKING:
    from torch import Tensor

SCALES = (1.0, 1.2, 1.5)


class Draw(NamedTuple):
    """What happens to one sample."""

    scale: float
    top: int
    left: int
    mirrored: bool


class Augmented(Dataset[Batch]):
    """A data set of ``(image, label, depth[, normal])`` whose samples are zoomed and mirrored at random.

    What happens to a sample is a function of the seed, of the epoch and of its index alone, whatever the batches and the
    number of workers. Call `set_epoch` at the beginning of every epoch, before workers are started.

    Args:
        data: The samples.
        seed: Of the draws, at least 0.
        multiply: Multiply what stands for the depth by the scale, as is right for inverse depth, instead of dividing it.
    """

    def __init__(self, data: Dataset[Batch], seed: int, *, multiply: bool = False) -> None:
        self.data = data
        self.seed = seed
        self.multiply = multiply
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: the epoch that begins, at least 0."""
        self.epoch = epoch

    def __getitem__(self, indices: list[int]) -> Batch:
        batch = self.data[indices]
        for row, index in enumerate(indices):
            sample = tuple(part[row] for part in batch)
            choice = draw(np.random.default_rng([self.seed, self.epoch, index]), *sample[1].shape)
            for part, new in zip(sample, augment(sample, choice, multiply=self.multiply), strict=True):
                part.copy_(new)
        return batch


def draw(rng: np.random.Generator, height: int, width: int) -> Draw:
    """A scale, a corner of the window that it leaves, with every place equally likely, and heads or tails."""
    scale = SCALES[rng.integers(len(SCALES))]
    top = rng.integers(height - int(height / scale), endpoint=True)
    left = rng.integers(width - int(width / scale), endpoint=True)
    return Draw(scale, int(top), int(left), bool(rng.random() < 0.5))


def augment(sample: tuple[Tensor, ...], choice: Draw, *, multiply: bool = False) -> tuple[Tensor, ...]:
    """Zoom, then mirror.

    A window of int(H / scale) x int(W / scale) pixels is enlarged to H x W: image and normals bilinearly, corner to corner,
    label and depth by the nearest pixel. Things that look larger are nearer: the depth is divided by the scale. Normals keep
    their direction but for mirroring, which negates their x; they are not brought back to length 1 where they were blended.

    Args:
        sample: Image (3, H, W), label (H, W), depth (1, H, W) and, perhaps, normal (3, H, W).
        choice: What to do.
        multiply: Multiply the depth by the scale instead.
    """
    if choice.scale != 1:
        sample = zoom(sample, choice, multiply=multiply)
    if choice.mirrored:
        image, label, depth, *normals = (part.flip(-1) for part in sample)
        across = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
        sample = (image, label, depth, *(normal * across for normal in normals))
    return sample


def zoom(sample: tuple[Tensor, ...], choice: Draw, *, multiply: bool) -> tuple[Tensor, ...]:
    """Enlarge the window that was drawn."""
    height, width = sample[1].shape
    rows = slice(choice.top, choice.top + int(height / choice.scale))
    columns = slice(choice.left, choice.left + int(width / choice.scale))
    image, label, depth, *normals = (part[..., rows, columns] for part in sample)
    smooth = interpolate(torch.cat([image, *normals])[None], (height, width), mode="bilinear", align_corners=True)[0]
    sharp = interpolate(torch.cat([label[None].float(), depth])[None], (height, width), mode="nearest")[0]
    depth = sharp[1:] * choice.scale if multiply else sharp[1:] / choice.scale
    return (smooth[:3], sharp[0].long(), depth, *([smooth[3:]] if normals else []))
