"""Scaled crops and mirroring of training images, as in the official codes for NYUv2 and CityScapes."""

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
    """The random choices for one sample."""

    scale: float
    top: int
    left: int
    mirrored: bool


class Augmented(Dataset[Batch]):
    """A data set of ``(image, label, depth[, normal])`` whose samples are zoomed and mirrored at random.

    The choices for a sample depend only on the seed, the epoch and its index, not on batches and the number of workers. Call
    `set_epoch` at the beginning of every epoch, before workers are started.

    Args:
        data: The samples.
        seed: Seed of the choices, at least 0.
        multiply: Multiply the depth by the scale, as inverse depth requires, instead of dividing it.
    """

    def __init__(self, data: Dataset[Batch], seed: int, *, multiply: bool = False) -> None:
        self.data = data
        self.seed = seed
        self.multiply = multiply
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, from 0, with new choices."""
        self.epoch = epoch

    def __getitem__(self, indices: list[int]) -> Batch:
        batch = self.data[indices]
        for row, index in enumerate(indices):
            sample = tuple(part[row] for part in batch)
            choices = draw(np.random.default_rng([self.seed, self.epoch, index]), *sample[1].shape)
            for part, new in zip(sample, augment(sample, choices, multiply=self.multiply), strict=True):
                part.copy_(new)
        return batch


def draw(rng: np.random.Generator, height: int, width: int) -> Draw:
    """Draw a scale, the corner of a window of that scale, with every place equally likely, and whether to mirror."""
    scale = SCALES[rng.integers(len(SCALES))]
    top = rng.integers(height - int(height / scale), endpoint=True)
    left = rng.integers(width - int(width / scale), endpoint=True)
    return Draw(scale, int(top), int(left), bool(rng.random() < 0.5))


def augment(sample: tuple[Tensor, ...], choices: Draw, *, multiply: bool = False) -> tuple[Tensor, ...]:
    """Zoom, then mirror.

    A window of int(H / scale) x int(W / scale) pixels becomes H x W: image and normals bilinearly, label and depth from
    the nearest pixel. Objects that look larger are nearer: the depth is divided by the scale. Normals keep their direction,
    except that mirroring negates their x. Blended normals are not scaled back to length 1.

    Args:
        sample: Image (3, H, W), label (H, W), depth (1, H, W) and, perhaps, normal (3, H, W).
        choices: Scale, window and mirroring.
        multiply: Multiply the depth by the scale instead.

    Returns:
        The sample, with its shapes.
    """
    if choices.scale != 1:
        sample = zoom(sample, choices, multiply=multiply)
    if choices.mirrored:
        image, label, depth, *normals = (part.flip(-1) for part in sample)
        across = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
        sample = (image, label, depth, *(normal * across for normal in normals))
    return sample


def zoom(sample: tuple[Tensor, ...], choices: Draw, *, multiply: bool) -> tuple[Tensor, ...]:
    """Enlarge the chosen window."""
    height, width = sample[1].shape
    rows = slice(choices.top, choices.top + int(height / choices.scale))
    columns = slice(choices.left, choices.left + int(width / choices.scale))
    image, label, depth, *normals = (part[..., rows, columns] for part in sample)
    smooth = interpolate(torch.cat([image, *normals])[None], (height, width), mode="bilinear", align_corners=True)[0]
    sharp = interpolate(torch.cat([label[None].float(), depth])[None], (height, width), mode="nearest")[0]
    depth = sharp[1:] * choices.scale if multiply else sharp[1:] / choices.scale
    return (smooth[:3], sharp[0].long(), depth, *([smooth[3:]] if normals else []))
