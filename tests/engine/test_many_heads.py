"""With many tasks, the pass of each task asks only for the heads that the task can reach."""

import math

import pytest
import torch
from torch import nn

from balance import Balancer
from balance.engine import passes

K = 24
OPTIONS = [{"engine": "loop"}, {"memory": "gramian"}, {"source": "features"}, {"gradient": "graddrop"}]


class Many(nn.Module):
    """A trunk, one head for each task, a head of every third task, and a task that avoids the trunk."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.joint = nn.Sequential(nn.Linear(5, 7), nn.Tanh()), nn.Linear(7, 1)
        self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(K))
        self.x = torch.randn(6, 5)

    def forward(self):
        """Return the features and K losses."""
        z = self.trunk(self.x)
        outputs = [head(z) + (self.joint(z) if k % 3 == 0 else 0) for k, head in enumerate(self.heads)]
        outputs[1] = self.heads[1](torch.ones(1, 7))  # reaches no shared parameter
        outputs[2] = self.heads[5](z)  # two tasks with one head
        return z, [output.square().mean() for output in outputs]


def gradients(monkeypatch, many, *, stacked, hint, **options):
    """Return the gradients of all parameters, None as NaN, and the numbers of targets of the backward passes."""
    numbers, run, network = [], passes.run_backward, Many()

    def counted(beginning, targets, *, retain_graph):
        numbers.append(len(targets))
        return run(beginning, targets, retain_graph=retain_graph)

    monkeypatch.setattr(passes, "run_backward", counted)
    monkeypatch.setattr(passes, "_MANY", many)
    balancer = Balancer(K, **{"gradient": "mgda"} | options)
    z, losses = network()
    given = torch.stack(losses) if stacked else dict(zip(balancer.tasks, losses, strict=True))
    balancer.backward(given, shared=network.trunk.parameters(), features=z if hint else None)
    monkeypatch.setattr(passes, "run_backward", run)
    flat = [torch.full_like(p, math.nan) if p.grad is None else p.grad for p in network.parameters()]
    return torch.cat([gradient.flatten() for gradient in flat]), numbers


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_equal_bit_for_bit(monkeypatch, options, stacked):
    hint = "source" in options
    few, _ = gradients(monkeypatch, 0, stacked=stacked, hint=hint, **options)
    every, _ = gradients(monkeypatch, math.inf, stacked=stacked, hint=hint, **options)
    assert torch.equal(few.nan_to_num(nan=123.0), every.nan_to_num(nan=123.0))
    assert few.isnan().any()  # head 2 is in no loss


def test_a_pass_asks_for_the_shared_parameters_and_the_heads_of_its_task(monkeypatch):
    _, numbers = gradients(monkeypatch, passes._MANY, stacked=True, hint=False)
    shared, of_joint = 2, [2 * (k % 3 == 0) for k in range(K)]
    assert numbers[:K] == [shared + 2 + joint for joint in of_joint]


def test_with_few_tasks_every_pass_asks_for_all(monkeypatch):
    _, numbers = gradients(monkeypatch, math.inf, stacked=True, hint=False)
    assert set(numbers[:K]) == {2 + 2 * K}  # all heads but one, and the joint head
