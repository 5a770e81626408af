"""Networks and helpers shared by the tests of this folder."""

import pytest
import torch
from torch import nn

from balance import Splitter, gradient_balancers
from balance.rules.compose import every

TASKS = ("a", "b", "c")


# that need neither losses nor gradients of the same parameters at every step
RULES = [
    name
    for name in gradient_balancers.names()
    if not {"positive losses", "parameters"}.intersection(gradient_balancers.traits(name).needs)
]


# rules of every kind: solved, projected, drawn, with state, of coordinates; `test_splitter` tries all others
OF_EVERY_KIND = (
    "mgda",
    "pcgrad",
    "cagrad",
    "imtl",
    "nashmtl",
    "graddrop",
    "gradvac",
    "upgrad",
    "ema_norm",
    "lr_annealing",
    "cr_mogm",
)
# every way to merge: what is normalised, projected, solved, drawn, kept
MODES = [
    {},
    {"projection": 1},
    {"projection": 3},
    {"gradient": None},
    {"gradient": None, "projection": 1},
    *({"gradient": name} for name in OF_EVERY_KIND),
    {"gradient": "every"},
]


ROTATABLE = [mode for mode in MODES if mode.get("gradient") not in ("graddrop", "lr_annealing")]  # which see coordinates


def splitter_of(tasks, mode, **options):
    if mode.get("gradient") == "every":
        mode = {"gradient": every(2, "nashmtl", tasks if isinstance(tasks, int) else len(tasks))}
    return Splitter(tasks, **mode, **options)


def name_of(mode):
    return "-".join(str(value) for value in mode.values()) or "normalized"


modes = pytest.mark.parametrize("mode", MODES, ids=name_of)


class Network(nn.Module):
    """A trunk, a splitter, a head for each task; float64, so that what should be equal is."""

    def __init__(self, splitter=None, seed=0, tasks=TASKS):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in tasks})
        self.splitter = splitter
        self.double()

    def forward(self, x):
        views = self.splitter(self.trunk(x))
        return {task: head(views[task]) for task, head in self.heads.items()}

    def losses(self, x):
        return {t: (y - i).square().mean() * 10**i for i, (t, y) in enumerate(self(x).items())}

    def grads(self):
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}

    def step(self, x, factor=1.0):
        """One step of gradient descent by one ordinary backward pass; the gradients."""
        self.zero_grad()
        (factor * sum(self.losses(x).values())).backward()
        with torch.no_grad():
            for p in self.parameters():
                p.sub_(p.grad, alpha=0.01)
        return self.grads()


def data(seed=1, batch=16):
    return torch.randn(batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merged(splitter, rows):
    """Return the merged gradient of the features, given the task gradients, ``None`` for an absent task."""
    rows = dict(zip(splitter.tasks, rows, strict=True))
    like = next(row for row in rows.values() if row is not None)
    x = torch.zeros_like(like, requires_grad=True)
    views = splitter(x)
    sum((views[task] * row).sum() for task, row in rows.items() if row is not None).backward()
    return x.grad


def gradients(seed, tasks, batch=4, size=3):
    return torch.randn(tasks, batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def tensors(state):
    """The tensors of a state_dict, nested ones too."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same_state(splitter, state):
    assert_same(tensors(splitter.state_dict()), tensors(state), rtol=0, atol=0, equal_nan=True)
