"""SegNet: an encoder, and a decoder that puts values back to the places that the encoder's pooling took them from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.functional import max_pool2d, max_unpool2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each stage, in the encoder and in the decoder


class Maps(NamedTuple):
    """Feature maps of one pass, by stage: of the encoder from shallow to deep, of the decoder from deep to shallow."""

    first: list[Tensor]  # after the first convolution of an encoder stage
    last: list[Tensor]  # after its last one, before pooling
    pooled: Tensor  # input of the decoder
    unpooled: list[Tensor]  # inputs of the decoder stages
    decoded: list[Tensor]  # outputs of the decoder stages


class SegNet(nn.Module):
    """The trunk of hard parameter sharing: images to one map of features for all tasks.

    Pooling halves each side and rounds down. The sides of images need not be multiples of 2 ** stages, since un-pooling
    restores the size before.

    Args:
        widths: Channels of each stage, from shallow to deep.
        depths: Convolutions of each stage.

    Shape:
        Images (B, 3, H, W), H and W at least 2 ** stages, to features (B, widths[0], H, W).

    Source:
        Badrinarayanan et al., "SegNet", PAMI 2017, with the widths, the biases and the initialisation of the benchmarks of
        Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019 (there: "Split").
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__()
        before = (3, *widths[:-1])
        after = (widths[0], *widths[:-1])
        self.encoder = nn.ModuleList(stage(*sizes) for sizes in zip(before, widths, depths, strict=True))
        self.decoder = nn.ModuleList(stage(*sizes) for sizes in reversed([*zip(widths, after, depths, strict=True)]))
        initialise(self)

    def maps(self, images: Tensor) -> Maps:
        """Return the maps that a task's attention uses.

        Args:
            images: Shape (B, 3, H, W).

        Returns:
            Maps of all stages.

        Raises:
            ValueError: If the images are too small to be pooled at every stage.
        """
        if min(images.shape[-2:]) < 2 ** len(self.encoder):
            raise ValueError(
                f"images must have sides of at least {2 ** len(self.encoder)} pixels for {len(self.encoder)} poolings, but got "
                f"{tuple(images.shape)}. Use larger images or fewer stages."
            )
        first, last, places, unpooled, decoded = [], [], [], [], []
        x = images
        for convolutions in self.encoder:
            begin, *others = convolutions.children()
            first.append(begin(x))
            last.append(nn.Sequential(*others)(first[-1]))
            x, indices = max_pool2d(last[-1], 2, return_indices=True)
            places.append(indices)
        pooled = x
        for convolutions, indices, encoded in zip(self.decoder, reversed(places), reversed(last), strict=True):
            unpooled.append(max_unpool2d(x, indices, [2, 2], output_size=encoded.shape[-2:]))
            x = convolutions(unpooled[-1])
            decoded.append(x)
        return Maps(first, last, pooled, unpooled, decoded)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, widths[0], H, W)."""
        return self.maps(images).decoded[-1]


def stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """Return the convolutions at one resolution; the first changes the number of channels."""
    return nn.Sequential(convolution(inputs, outputs), *(convolution(outputs, outputs) for _ in range(depth - 1)))


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3 x 3 convolution, with a bias although normalisation follows: the published parameter counts include it."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def initialise(network: nn.Module) -> None:
    """Initialise convolutions Xavier-normal with bias zero; normalisation stays at scale one and shift zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
