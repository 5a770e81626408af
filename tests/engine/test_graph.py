"""Traversal of graphs, and losses that are given as a stack."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from balance import Balancer
from balance.engine.graph import Reachability, activation_count, last_uses, leaves, trace, unpacks_saved_tensors
from tests.engine.definition import grads, many_losses, rows
from tests.networks import TASKS, named, network, thin_layer


def test_stack_of_losses_visits_each_head_once_per_task():
    model = network("mlp")
    visits = []
    torch.manual_seed(7)
    z = model.trunk(model.x)
    outputs = [head(z) for head in model.heads]
    for k, output in enumerate(outputs):
        output.register_hook(lambda _, k=k: visits.append(k))
    losses = torch.stack([output.square().mean() for output in outputs])
    Balancer(TASKS, gradient="pcgrad").backward(losses, shared=model.trunk.parameters())
    assert visits[:3] == [0, 1, 2]
    assert len(visits) <= 6  # and once more in a weighted pass, if there is one


@pytest.mark.parametrize("hint", [False, True])
def test_stack_of_losses_equals_a_dict(hint):
    results = []
    for form in (dict, torch.stack):
        model = network("mlp")
        z, losses = model.losses()
        losses = named(losses) if form is dict else torch.stack(losses)
        Balancer(TASKS, gradient="pcgrad", loss="uw").backward(
            losses, shared=model.trunk.parameters(), features=z if hint else None
        )
        results.append(grads(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=0, atol=0)


def test_stack_of_losses_may_have_constants_and_other_dtypes():
    layer, x = thin_layer()
    first = layer(x).sum()
    mixed = torch.stack([first, first.double() ** 2, torch.tensor(1.0)])
    report = Balancer(3, gradient="mgda").backward(mixed, shared=layer.parameters())
    assert report.gramian[2].abs().max() == 0
    assert report.gramian[1, 1] > 0


def test_hook_on_a_stack_of_losses_acts():
    layer, x = thin_layer()
    losses = torch.stack(many_losses(layer(x), 2))
    losses.register_hook(lambda gradient: 2 * gradient)
    J = rows(list(losses.unbind()), [layer.weight, layer.bias]).double()
    report = Balancer(2, gradient="mgda").backward(losses, shared=layer.parameters())
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-5, atol=1e-5)


def chain():
    """Return weights that a forward pass uses in order, and losses of its three intermediate results."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(3)]
    results = [torch.ones(2, 3)]
    for weight in weights:
        results.append((results[-1] @ weight).tanh())
    return weights, [result.sum() for result in results[1:]], results[1:]


def test_leaves_are_each_tensor_once_that_gets_a_gradient():
    weights, losses, _ = chain()
    found = leaves([losses[2], None, losses[0], torch.ones(())])
    assert sorted(map(id, found)) == sorted(map(id, weights))
    assert [leaf is weights[0] for leaf in leaves([losses[0]])] == [True]


def test_trace_stops_at_tensors():
    weights, losses, results = chain()
    graph = trace(losses, stop=[results[1]])
    assert {id(leaf) for leaf in graph.leaves} == {id(weights[0]), id(weights[2])}
    assert graph.disjoint
    assert not trace(losses).disjoint


def test_reachability_is_a_nonzero_gradient():
    weights, losses, results = chain()
    paths = Reachability(trace(losses), losses)
    for target in (*weights, *results):
        expected = [torch.autograd.grad(loss, target, retain_graph=True, allow_unused=True)[0] is not None for loss in losses]
        assert paths.roots_reaching(target) == expected
    assert paths.roots_reaching_any(weights[1:]) == [False, True, True]


def test_reachability_includes_tensors_at_which_the_walk_stopped():
    _, losses, results = chain()
    roots = [losses[0], losses[1], losses[2], results[1]]
    assert Reachability(trace(roots, stop=[results[1]]), roots).roots_reaching_any([]) == [False, True, True, True]


def test_last_uses_are_in_the_order_of_the_forward_pass():
    weights, losses, _ = chain()
    uses = last_uses(trace(losses), [*weights, torch.ones(1, requires_grad=True)])
    assert uses[0] < uses[1] < uses[2]
    assert uses[3] == -1


def test_activation_count_is_the_number_of_computed_entries():
    x = torch.ones(4, 5, requires_grad=True)
    assert activation_count(trace([x.exp().sin().sum()])) == 2 * 20 + 1


@pytest.mark.parametrize("saved", ["plain", "checkpoint", "hooks"])
def test_unpacks_saved_tensors_if_hooks_do(saved):
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    if saved == "checkpoint":
        y = checkpoint(layer, x, use_reentrant=False)
    elif saved == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = layer(x)
    else:
        y = layer(x)
    assert unpacks_saved_tensors(trace([y])) == (saved != "plain")
