"""MTAN: a SegNet, and for each task an attention over its maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import interpolate, max_pool2d

from experiments.problems.dense.segnet import DEPTHS, WIDTHS, SegNet, convolution, initialise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from experiments.problems.dense.segnet import Maps


class MTAN(nn.Module):
    """Images to one map of features per task.

    At each stage a task's mask, of values in 0..1, multiplies the stage's last map. It is computed from the stage's first map
    and the attended map of the stage before. Every task has separate masks; all tasks share the convolutions between them
    (``encoder_steps``, ``decoder_steps``) and the SegNet.

    All of it belongs to the trunk, including the masks, as in the published codes, where every parameter outside the
    prediction layers is shared. A mask has a gradient from one task only, so its columns of the Jacobian have one nonzero row.
    They never conflict, and they add to the lengths of the task gradients.

    Args:
        num_tasks: K.
        widths: Channels of each stage, from shallow to deep.
        depths: Convolutions of each stage of the SegNet.

    Shape:
        Images (B, 3, H, W), H and W at least 2 ** stages, to a tuple of K maps (B, widths[0], H, W).

    Source:
        Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019. Differs: up-sampling goes to the size of the
        shared map of the stage, which is the double wherever H and W are multiples of 2 ** stages.
    """

    def __init__(self, num_tasks: int, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__()
        self.shared = SegNet(widths, depths)
        deeper = (*widths[1:], widths[-1])
        decoded = [*reversed((widths[0], *widths[:-1]))]
        deep_first = [*reversed(widths)]
        self.encoder_steps = nn.ModuleList(convolution(*sizes) for sizes in zip(widths, deeper, strict=True))
        self.decoder_steps = nn.ModuleList(convolution(*sizes) for sizes in zip(deep_first, decoded, strict=True))
        seen = (widths[0], *(2 * width for width in widths[1:]))
        self.encoder_masks = nn.ModuleList(masks(zip(seen, widths, strict=True)) for _ in range(num_tasks))
        seen_back = [unpooled + step for unpooled, step in zip(deep_first, decoded, strict=True)]
        self.decoder_masks = nn.ModuleList(masks(zip(seen_back, decoded, strict=True)) for _ in range(num_tasks))
        initialise(self)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return features of each task, (B, widths[0], H, W)."""
        maps = self.shared.maps(images)
        return tuple(
            self.decode(decoder_masks, maps, self.encode(encoder_masks, maps))
            for encoder_masks, decoder_masks in zip(self.encoder_masks, self.decoder_masks, strict=True)
        )

    def encode(self, masks: nn.Module, maps: Maps) -> Tensor:
        """Return the attended map of one task after the encoder."""
        attended: list[Tensor] = []
        for mask, step, first, last in zip(masks.children(), self.encoder_steps, maps.first, maps.last, strict=True):
            selected = mask(torch.cat([first, *attended], dim=1)) * last
            attended = [max_pool2d(step(selected), 2)]
        return attended[0]

    def decode(self, masks: nn.Module, maps: Maps, attended: Tensor) -> Tensor:
        """Return the attended map of one task after the decoder, from the attended map after the encoder."""
        for mask, step, unpooled, decoded in zip(
            masks.children(), self.decoder_steps, maps.unpooled, maps.decoded, strict=True
        ):
            larger = interpolate(attended, size=unpooled.shape[-2:], mode="bilinear", align_corners=True)
            attended = mask(torch.cat([unpooled, step(larger)], dim=1)) * decoded
        return attended


def masks(sizes: Iterable[tuple[int, int]]) -> nn.ModuleList:
    """Return one mask per stage."""
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(inputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
            nn.Sigmoid(),
        )
        for inputs, outputs in sizes
    )
