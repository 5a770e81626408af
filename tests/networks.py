"""Networks with a shared trunk and a head for each task, for tests of whole steps."""

import torch
from torch import nn

TASKS = ("a", "b", "c")


def named(losses):
    """Return the losses of all tasks by name."""
    return dict(zip(TASKS, losses, strict=True))


class MultiHead(nn.Module):
    """A trunk, a head for each task, and a layer that two heads use."""

    def __init__(self, trunk, x, width, num_tasks=3):
        super().__init__()
        self.trunk, self.x = trunk, x
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(num_tasks))
        self.common = nn.Linear(3, 3)
        self.register_buffer("targets", torch.randn(num_tasks, len(x), 3))

    def losses(self):
        """Return the features, and the losses in order."""
        torch.manual_seed(7)  # the same dropout in every pass
        z = self.trunk(self.x)
        outputs = [head(z) for head in self.heads]
        outputs[:2] = [self.common(output).tanh() for output in outputs[:2]]
        pairs = zip(outputs, self.targets, strict=True)
        return z, [(k + 1) * (output - target).square().mean() for k, (output, target) in enumerate(pairs)]


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = block(width, width, 1)

    def forward(self, x):
        return (x + self.body(x)).relu()


class Encoder(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=dropout, batch_first=True) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=1)


class Wide(nn.Module):
    """Layers that are large relative to their batch of activations."""

    def __init__(self, num_layers=6, width=320, batch=200, num_tasks=8):
        super().__init__()
        self.trunk = nn.Sequential(*(m for _ in range(num_layers) for m in (nn.Linear(width, width), nn.Tanh())))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))
        self.x = torch.randn(batch, width)

    def losses(self):
        """Return the features, and the losses by name."""
        z = self.trunk(self.x)
        return z, {str(k): head(z).square().mean() for k, head in enumerate(self.heads)}


def block(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(2, outputs), nn.ReLU())


def mlp():
    layers = [m for _ in range(4) for m in (nn.Linear(24, 24), nn.ReLU())]
    return MultiHead(nn.Sequential(*layers, nn.Dropout(0.3)), torch.randn(6, 24), 24)


def convolutional():
    trunk = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=1), nn.ReLU(), nn.Conv2d(16, 16, (1, 3), padding="same")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return MultiHead(trunk, torch.randn(3, 2, 8, 8), 16)


def resnet():
    trunk = nn.Sequential(block(3, 8, 1), Residual(8), block(8, 32, 2), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiHead(trunk, torch.randn(2, 3, 6, 6), 32)


def transformer():
    return MultiHead(Encoder(16, dropout=0.1), torch.randn(2, 3, 16), 16)


def frozen():
    """Return an MLP with some frozen parameters, and a layer that no task reaches."""
    network = mlp()
    network.trunk[2].weight.requires_grad_(False)
    network.trunk[4].bias.requires_grad_(False)
    network.trunk.register_module("unused", nn.Linear(3, 3))
    network.trunk.forward = lambda x: nn.Sequential.forward(network.trunk[:9], x)
    return network


NETWORKS = {f.__name__: f for f in (mlp, convolutional, resnet, transformer, frozen)}


def network(name, dtype=torch.float64):
    """Return a network of `NETWORKS`, equal at every call."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(dtype)
    model.x = model.x.to(dtype)
    return model


def thin_layer(width=64, batch=3):
    """Return a layer whose weight is much larger than its batch, so that its gradients are worth shortening, and inputs."""
    return nn.Linear(width, width), torch.randn(batch, width)
