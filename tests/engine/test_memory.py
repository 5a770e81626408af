"""Memory that a step keeps, and graphs that it frees."""

import pytest
import torch
from torch import nn

import balance
from balance import Balancer
from balance.profiling import peak_memory
from tests.networks import TASKS, Wide, named, network, thin_layer


def extra_memory(model, balancer, hint, **arguments):
    shared = list(model.trunk.parameters())

    def plain():
        torch.stack(list(model.losses()[1].values())).sum().backward()

    def step():
        z, losses = model.losses()
        balancer.backward(losses, shared=shared, features=z if hint else None, **arguments)

    found = []
    for run in (plain, step, step):
        model.zero_grad()
        found.append(peak_memory(run))
    return found[-1] - found[0]


@pytest.mark.parametrize("batch", [20, 200], ids=["short", "full"])
@pytest.mark.parametrize("hint", [False, True], ids=["", "features"])
@pytest.mark.parametrize(("options", "limit"), [({"memory": "jacobian"}, 1.1), ({"memory": "gramian"}, 0.5)])
def test_step_keeps_within_its_estimate(batch, hint, options, limit):
    model = Wide(batch=batch)
    shared = list(model.trunk.parameters())
    balancer = Balancer(8, gradient="imtl", engine="loop", **options)
    estimate = balancer.estimate(shared)
    jacobian = 8 * 4 * sum(p.numel() for p in shared)
    assert estimate.jacobian == jacobian
    assert estimate.gramian <= 0.4 * jacobian
    extra = extra_memory(model, balancer, hint)
    assert extra <= limit * jacobian
    assert extra <= 1.1 * estimate.bytes + 4 * 8 * 3 * batch * 320  # a few activations, should features be held
    if batch == 20:
        assert extra <= 0.3 * jacobian  # gradients of the layers' outputs are shorter


def test_estimate_needs_no_step():
    model = Wide()
    shared = list(model.trunk.parameters())
    assert Balancer(8).estimate(shared).bytes == 0
    z = torch.empty(200, 320)
    assert Balancer(8, gradient="mgda", source="features").estimate(features=z).bytes == 8 * 4 * 200 * 320
    part = Balancer(8, gradient="mgda").estimate(shared, measure=shared[-2:])
    assert part.bytes == 8 * 4 * (320 * 320 + 320)
    assert Balancer(8, gradient="mgda", memory="gramian").estimate(shared).bytes < 0.4 * part.bytes * 6 + 1


def test_rule_gets_the_jacobian_without_a_copy(monkeypatch):
    model = Wide(batch=200)
    seen = []

    def rule(jacobian):
        seen.append(jacobian)
        return jacobian.sum(dim=0)

    monkeypatch.setattr(balance.gradient_balancers, "build", lambda *_, **__: rule)
    balancer = Balancer(8, gradient="graddrop")
    extra = extra_memory(model, balancer, hint=False)
    J = seen[-1]
    assert extra <= 1.4 * J.numel() * 4  # with the direction itself, and what the rule does
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(sum(model.losses()[1].values()), list(model.trunk.parameters()))]
    )
    torch.testing.assert_close(J.sum(dim=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("memory", ["jacobian", "gramian"])
@pytest.mark.parametrize("hint", [False, True])
def test_engine_frees_the_graph(engine, memory, hint):
    balancer = Balancer(TASKS, gradient="mgda", engine=engine, memory=memory)
    for _ in range(2):  # a batched engine keeps it once, until it knows that it can
        model = network("mlp")
        z, losses = model.losses()
        balancer.backward(named(losses), shared=model.trunk.parameters(), features=z if hint else None)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_engine_frees_each_head_with_its_pass():
    torch.manual_seed(0)
    trunk, x = thin_layer()
    heads = [nn.Linear(64, 64) for _ in TASKS]
    z = trunk(x)
    losses = {task: head(z).square().mean() for task, head in zip(TASKS, heads, strict=True)}
    Balancer(TASKS, gradient="mgda", source="features").backward(losses, features=z)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
