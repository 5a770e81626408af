"""A convolutional trunk and 40 linear heads, in the size of the papers and in one for CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from balance.config import check_settings, setting
from experiments.problems.base import Heads, Network, ScalarHead
from experiments.problems.celeba.tasks import TASKS


@dataclass
class ModelConfig:
    """The network: ``official`` has 5 197 160 parameters, ``small`` 126 072, for drawn images on a CPU."""

    name: str = setting("small", choices=("small", "official"), help="network")


class Shape(NamedTuple):
    """Sizes of a network."""

    stages: tuple[tuple[int, ...], ...]  # channels of the convolutions; images are halved between stages
    stride: int  # of the first convolution
    pooled: int  # side of the map to which the output of the last stage is averaged
    hidden: tuple[int, ...]  # widths of the fully connected layers


SHAPES = {
    "official": Shape(((64,), (128, 128), (256, 256), (512, 512)), 1, 1, (512, 512)),
    "small": Shape(((16,), (32,), (64,)), 2, 4, (96,)),
}


def build_model(config: ModelConfig | None = None) -> Network:
    """Return a freshly initialised network: images (B, 3, 64, 64) to logits (B,) by task.

    Args:
        config: The network; the small one by default.

    Returns:
        The network.

    Source:
        The 9 layers of the FAMO repository (Liu et al., NeurIPS 2023), seven of them convolutions. Differs: heads return
        logits, and the loss takes their sigmoid.
    """
    config = config or ModelConfig()
    check_settings(config, "model")
    shape = SHAPES[config.name]
    return Network(_trunk(shape), Heads({task: ScalarHead(shape.hidden[-1]) for task in TASKS}))


def _trunk(shape: Shape) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, stride = 3, shape.stride
    for stage in shape.stages:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels, stride = width, 1
    layers += [nn.AdaptiveAvgPool2d(shape.pooled), nn.Flatten()]
    features = channels * shape.pooled**2
    for width in shape.hidden:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers)
