import pytest
import torch
from torch import nn

import balance
from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same, reference

# Accumulation, frozen and unreached parameters


@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_grad_is_added_to(gradient, source):
    def step(network, times):
        balancer = Balancer(TASKS, loss="uw", gradient=gradient, source=source, gradient_options={})
        for _ in range(times):
            features = network.trunk(network.x)
            torch.manual_seed(0)
            balancer.backward(network.losses(features), shared=network.shared(), features=features)
            if gradient == "pcgrad":
                balancer.gradient_balancer.rule.random.__init__(1)  # the same order again
        return network.grads() | {str(k): s.grad for k, s in enumerate(balancer.loss_balancer.rule.log_variances)}

    once, twice = step(Network(), 1), step(Network(), 2)
    assert_same(twice, {name: 2 * g for name, g in once.items()})


def test_grad_is_added_in_place():
    network = Network()
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.grad for name, p in network.named_parameters()}
    Balancer(TASKS, gradient="pcgrad").backward(network.losses(), shared=network.shared())
    assert all(p.grad is before[name] for name, p in network.named_parameters())
    assert not any(torch.equal(g, torch.ones_like(g)) for g in before.values())


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
def test_frozen_and_unreached_parameters(gradient):
    network = Network()
    network.trunk[0].weight.requires_grad_(False)
    network.unused = nn.Linear(3, 3)
    extra = nn.Parameter(torch.zeros(4))
    balancer = Balancer(TASKS, gradient=gradient)
    balancer.backward(network.losses(), shared=[*network.shared(), extra, *network.unused.parameters()])
    grads = network.grads()
    untouched = {name for name, g in grads.items() if g is None}
    assert untouched == {"trunk.0.weight", "unused.weight", "unused.bias"}
    assert extra.grad is None


def test_a_wholly_frozen_trunk_trains_heads_unweighted():
    network = Network()
    network.trunk.requires_grad_(False)
    report = Balancer(TASKS, gradient="mgda").backward(network.losses(), shared=network.shared())
    twin = Network()
    sum(twin.losses().values()).backward()
    for p, q in zip(network.heads.parameters(), twin.heads.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert report.gradient_weights.tolist() == [1, 1, 1]


def test_a_task_without_a_graph_has_gradient_zero():
    network = Network()
    losses = network.losses() | {"b": torch.tensor(0.0)}
    report = Balancer(TASKS, gradient="pcgrad").backward(losses, shared=network.shared())
    assert report.gramian[1].tolist() == [0, 0, 0]
    assert report.cosines.isfinite().all()
    assert all(p.grad is None for p in network.heads["b"].parameters())


def test_a_parameter_shared_by_some_tasks_only_and_tied_heads():
    shared, tied = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"a": (shared * tied).sum(), "b": (3 * shared).sum(), "c": (2 * tied).sum()}
    report = Balancer(TASKS, gradient=lambda G: torch.tensor([1.0, 10.0]), heads="weighted").backward(
        losses, shared=[shared, shared]
    )
    assert shared.grad.tolist() == [31, 31]
    assert tied.grad.tolist() == [3, 3]  # "c" reaches nothing shared: weight one
    assert (report.unshared, report.gradient_weights.tolist()) == (("c",), [1, 10, 1])


def test_graph_is_freed():
    network = Network()
    losses = network.losses()
    Balancer(TASKS, gradient="mgda").backward(losses, shared=network.shared())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        sum(losses.values()).backward()


def test_half_precision_parameters():
    network = Network().bfloat16()
    network.x = network.x.bfloat16()
    report = Balancer(TASKS, gradient="mgda").backward(network.losses(), shared=network.shared())
    assert report.gramian.dtype == torch.float64
    assert {p.grad.dtype for p in network.parameters()} == {torch.bfloat16}


def test_sparse_embedding_gradients():
    table = nn.Embedding(5, 3, sparse=True)
    z = table(torch.tensor([0, 2]))
    losses = torch.stack([z.sum(), z.square().sum()])
    expected = torch.stack([torch.autograd.grad(loss, table.weight, retain_graph=True)[0].to_dense() for loss in losses])
    report = Balancer(2, gradient="mgda").backward(losses, shared=table.parameters())
    assert table.weight.grad.is_sparse
    J = expected.flatten(1).double()
    torch.testing.assert_close(report.gramian, J @ J.T)
    direction = torch.einsum("k,kij->ij", report.gradient_weights, expected)
    torch.testing.assert_close(table.weight.grad.to_dense(), direction)


# Features


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("gradient", ["mgda", "pcgrad"])
def test_features(gradient, several):
    network = Network()
    z = network.trunk(network.x)
    pieces = list(z.split(3, dim=1)) if several else z
    losses = network.losses(torch.cat(pieces, dim=1) if several else z)
    report = Balancer(TASKS, gradient=gradient, source="features").backward(losses, shared=network.shared(), features=pieces)
    twin = Network()
    features = twin.trunk(twin.x)
    rows = [torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in twin.losses(features).values()]
    G = torch.stack(rows).double() @ torch.stack(rows).double().T
    torch.testing.assert_close(report.gramian, G, rtol=1e-5, atol=1e-12)
    weights = balance.gradient_balancers.build(gradient)(G).float()
    heads = weights if gradient == "mgda" else torch.ones(3)
    assert_same(network.grads(), reference(twin, weights, heads), rtol=1e-4, atol=1e-4)


def test_paths_around_the_features_count_once():
    """A parameter below the features that a loss also reaches directly, sibling outputs, nested and repeated features."""

    def step(source, choose):
        network = Network()
        below = network.trunk[1](network.trunk[0](network.x))
        z = network.trunk[3](network.trunk[2](below))
        losses = network.losses(z)
        losses["a"] = losses["a"] + network.trunk[0].weight.square().sum()
        losses["b"] = losses["b"] + below.square().mean()
        balancer = Balancer(TASKS, gradient=lambda G: torch.tensor([1.0, 2.0, 3.0]), source=source, heads="weighted")
        balancer.backward(losses, shared=network.shared(), features=choose(below, z))
        return network.grads()

    expected = step("parameters", lambda below, z: None)
    for choose in (lambda below, z: z, lambda below, z: [below, z], lambda below, z: [z, z]):
        assert_same(step("features", choose), expected, rtol=1e-4, atol=1e-5)


def test_a_sibling_of_the_features_counts():
    encoder = nn.Linear(3, 4)
    mean, deviation = encoder(torch.ones(2, 3)).chunk(2, dim=1)
    losses = {"a": mean.square().sum() + deviation.exp().sum(), "b": mean.sum()}
    Balancer(("a", "b"), gradient=lambda G: torch.ones(2), source="features").backward(losses, features=mean)
    grads = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    mean, deviation = encoder(torch.ones(2, 3)).chunk(2, dim=1)
    (mean.square().sum() + deviation.exp().sum() + mean.sum()).backward()
    for grad, p in zip(grads, encoder.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


def test_a_feature_that_no_task_reaches_leaves_its_parameters_alone():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    features = [one(x), other(x)]
    Balancer(2, gradient="mgda", source="features").backward({"0": features[0].sum()}, features=features)
    assert one.weight.grad is not None
    assert other.weight.grad is None
