"""Networks and helpers shared by the tests of this folder."""

import copy

import torch
from torch import nn

TASKS = ("a", "b", "c")


class Network(nn.Module):
    def __init__(self, seed=0, tasks=TASKS):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in tasks})
        self.x = torch.randn(16, 5)

    def losses(self, features=None):
        features = self.trunk(self.x) if features is None else features
        return {t: (h(features) - i).square().mean() * 10**i for i, (t, h) in enumerate(self.heads.items())}

    def shared(self):
        return self.trunk.parameters()

    def grads(self):
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.named_parameters()}


def assert_same(a, b, **tolerances):
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert (a[name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(a[name], expected, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def reference(network, weights, head_weights):
    """Gradients by one ordinary backward per task: shared by ``weights``, heads by ``head_weights``."""
    twin = copy.deepcopy(network)
    for task, w, h in zip(network.heads, weights, head_weights, strict=True):
        trunk, head = list(twin.trunk.parameters()), list(twin.heads[task].parameters())
        gradients = torch.autograd.grad(twin.losses()[task], [*trunk, *head])
        for p, g, factor in zip([*trunk, *head], gradients, [w] * len(trunk) + [h] * len(head), strict=True):
            p.grad = factor * g if p.grad is None else p.grad + factor * g
    return twin.grads()


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_state(value, b[key])
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[key], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == b[key]
