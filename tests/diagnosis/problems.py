"""Small problems with known losses and gradients, and a stand-in for the clock."""

import torch
from torch import nn

import balance
from balance.profiling import Cost

NONE = {"loss_methods": (), "gradient_methods": ()}


class Quadratics(nn.Module):
    """Half the squared distances of the parameters from a target for each task, times the batch, which is a number.

    Gradients at the start, where the parameters are zero: minus the targets, times the batch.
    """

    def __init__(self, **targets):
        super().__init__()
        self.targets = {task: torch.tensor(target, dtype=torch.float64) for task, target in targets.items()}
        size = len(next(iter(self.targets.values())))
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def losses(self, batch):
        return {task: batch * (self.theta - target).square().sum() / 2 for task, target in self.targets.items()}


class Scaled(Quadratics):
    """A thousand times the losses of the last task."""

    def losses(self, batch):
        losses = super().losses(batch)
        last = list(losses)[-1]
        return losses | {last: 1000 * losses[last]}


class Linear(nn.Module):
    """Losses that are linear in the parameters: ``constant + slope @ theta`` with a slope by task and batch."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def losses(self, batch):
        return {task: constant + slope @ self.theta for task, (constant, slope) in batch.items()}


class Untidy(nn.Module):
    """Batch norm, dropout, a frozen layer, a part in evaluation mode, extra state, gradients of an earlier step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)
        )
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
        self.trunk[0].weight.requires_grad_(False)
        self.trunk[5].eval()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.calls = 0
        for k, parameter in enumerate(self.parameters()):
            if parameter.requires_grad and k % 2:
                parameter.grad = torch.randn_like(parameter)

    def losses(self, batch):
        self.steps = self.steps + 1
        self.calls += 1
        features = self.trunk(batch)
        return {task: (head(features) - 1).square().mean() for task, head in self.heads.items()}

    def get_extra_state(self):
        return torch.tensor(self.calls)

    def set_extra_state(self, state):
        self.calls = int(state)


def batches_of_four(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 4, generator=generator) for _ in range(count)]


def diagnose(model, batches=(1.0, 2.0, 3.0), **options):
    return balance.diagnose(model.losses, batches, model=model, shared=model.parameters(), **{**NONE, **options})


def text(diagnosis):
    return " ".join(diagnosis.recommendation)


class Meter:
    """Replacement of the measurement of costs: one call of each step, and given seconds in turn."""

    def __init__(self, *seconds):
        self.seconds = iter(seconds)

    def __call__(self, step, **_):
        step()
        return Cost(next(self.seconds, 1.0), 100)
