import pytest
import torch

import balance
from balance.diagnosis import measurement
from balance.types import Remedy


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """One timed step of each method."""
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    monkeypatch.setattr(measurement, "REPEATS", 1)


@pytest.fixture
def registries(monkeypatch):
    """Registrations of a test end with it."""
    for registry in (balance.loss_balancers, balance.gradient_balancers):
        monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.fixture
def one_rule_per_remedy(monkeypatch):
    """One loss balancer and one gradient balancer for each remedy, such as ``loss_conflict``, and ls, but no others."""
    only_ls = {"ls": balance.loss_balancers._methods["ls"]}
    monkeypatch.setattr(balance.loss_balancers, "_methods", only_ls)
    monkeypatch.setattr(balance.gradient_balancers, "_methods", {})
    for remedy in Remedy.__args__:
        name = remedy.replace(" ", "_")
        balance.loss_balancers.register(f"loss_{name}", remedies=[remedy])(lambda losses: losses)
        balance.gradient_balancers.register(f"gradient_{name}", remedies=[remedy])(ones)


def ones(gramian):
    return torch.ones_like(gramian[0])
