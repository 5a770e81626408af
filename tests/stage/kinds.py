"""Networks and helpers shared by the tests of this folder."""

import torch
from torch import nn

TASKS = ("a", "b", "c")


def ones(gramian):
    return torch.ones(len(gramian), dtype=gramian.dtype)


class Spoiling(torch.autograd.Function):
    """Multiplies gradients by infinity or NaN when it is switched on."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return (g if ctx.factor is None else g * ctx.factor), None


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(5, 5), nn.Linear(5, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})
        self.x = torch.randn(7, 5)

    def losses(self, factor=None, tasks=TASKS):
        z = self.high(Spoiling.apply(self.low(self.x), factor)).tanh()
        return z, {task: (self.heads[task](z) - k - 1).square().mean() for k, task in enumerate(TASKS) if task in tasks}

    def shared(self):
        return [*self.low.parameters(), *self.high.parameters()]


def layers():
    torch.manual_seed(0)
    return Layers()
