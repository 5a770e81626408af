"""Networks to measure on: a shared trunk, K linear heads, and a batch of inputs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from balance import Splitter


class Network(nn.Module):
    """A trunk whose features K heads share; the targets of the heads are random."""

    def __init__(self, trunk: nn.Module, x: Tensor, num_features: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk, self.x = trunk, x
        self.heads = nn.ModuleList(nn.Linear(num_features, 8) for _ in range(num_tasks))
        self.targets = torch.randn(num_tasks, len(x), 8)

    def forward(self, splitter: Splitter | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the features and one loss per task, with a splitter between trunk and heads if one is given."""
        features = self.trunk(self.x)
        views = [features] * len(self.heads) if splitter is None else splitter(features).values()
        parts = zip(self.heads, views, self.targets, strict=True)
        return features, [(head(view) - target).square().mean() for head, view, target in parts]

    @property
    def last_quarter(self) -> list[nn.Parameter]:
        """Parameters of the last quarter of the trunk's layers."""
        layers = [m for m in self.trunk.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        chosen = layers[-max(len(layers) // 4, 1) :]
        return [parameter for layer in chosen for parameter in layer.parameters()]


class Residual(nn.Module):
    """Two convolutions with group normalisation, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add both ways. Images of shape (B, inputs, H, W) become (B, outputs, H / stride, W / stride)."""
        return (self.body(x) + self.around(x)).relu()


class Transformer(nn.Module):
    """Encoder layers over a sequence, averaged over it."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Average the last layer. Sequences of shape (B, T, width) become (B, width)."""
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=1)


def mlp(num_tasks: int) -> Network:
    """Build 4 layers of 512, batch 128; 1.05 million shared parameters."""
    layers = [m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU())]
    return Network(nn.Sequential(*layers), torch.randn(128, 512), 512, num_tasks)


def convolutional(num_tasks: int) -> Network:
    """Build 3 convolutions on images of 64 x 64, batch 64; 24 000 shared parameters."""
    trunk = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
    )
    return Network(trunk, torch.randn(64, 3, 64, 64), 1024, num_tasks)


def resnet(num_tasks: int) -> Network:
    """Build a ResNet-18 with group normalisation, images of 64 x 64, batch 8; 11.2 million shared parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for outputs in (64, 128, 256, 512):
        layers += [Residual(width, outputs, 1 if outputs == width else 2), Residual(outputs, outputs, 1)]
        width = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Network(nn.Sequential(*layers), torch.randn(8, 3, 64, 64), 512, num_tasks)


def transformer(num_tasks: int) -> Network:
    """Build 2 encoder layers of width 128, sequences of 32, batch 16; 0.4 million shared parameters."""
    return Network(Transformer(2, 128), torch.randn(16, 32, 128), 128, num_tasks)


def layers_of(*sizes: int) -> nn.Sequential:
    """Return linear layers of some sizes, each with a ReLU."""
    return nn.Sequential(*(m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), nn.ReLU())))


def small_mlp(num_tasks: int) -> Network:
    """Build 2 layers of 32, batch 8, as in reinforcement learning; 1600 shared parameters."""
    return Network(layers_of(16, 32, 32), torch.randn(8, 16), 32, num_tasks)


def medium_mlp(num_tasks: int) -> Network:
    """Build 3 layers of 128, batch 64, as for tables; 41 000 shared parameters."""
    return Network(layers_of(64, 128, 128, 128), torch.randn(64, 64), 128, num_tasks)


def small_convolutional(num_tasks: int) -> Network:
    """Build 2 convolutions on images of 16 x 16, batch 16; 1200 shared parameters."""
    trunk = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    )
    return Network(trunk, torch.randn(16, 1, 16, 16), 64, num_tasks)


def small_transformer(num_tasks: int) -> Network:
    """Build 2 encoder layers of width 8, sequences of 4, batch 4; 1700 shared parameters."""
    return Network(Transformer(2, 8), torch.randn(4, 4, 8), 8, num_tasks)


def medium_transformer(num_tasks: int) -> Network:
    """Build 2 encoder layers of width 32, sequences of 16, batch 8; 25 000 shared parameters."""
    return Network(Transformer(2, 32), torch.randn(8, 16, 32), 32, num_tasks)


SMALL_NETWORKS: dict[str, Callable[[int], Network]] = {
    "small mlp": small_mlp,
    "medium mlp": medium_mlp,
    "small convolutional": small_convolutional,
    "small transformer": small_transformer,
    "medium transformer": medium_transformer,
}

NETWORKS: dict[str, Callable[[int], Network]] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "resnet": resnet,
    "transformer": transformer,
}
