"""Shared parameters, heads and features, from the graph and from arguments."""

import pytest
import torch

from balance import Balancer
from balance.engine.partition import partition_graph, read_features, read_shared
from tests.engine.definition import WAYS, grads, in_proportion
from tests.networks import TASKS, named, network


def test_arguments_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="sees the Jacobian, which memory='gramian' does not keep"):
        Balancer(2, gradient="graddrop", memory="gramian")
    with pytest.raises(ValueError, match="engine"):
        Balancer(2, gradient="mgda", engine="vmap")
    with pytest.raises(ValueError, match="memory"):
        Balancer(2, gradient="mgda", memory="little")
    model = network("mlp")
    z, losses = model.losses()
    losses = named(losses)
    last = list(model.trunk[6].parameters())
    with pytest.raises(ValueError, match="measure is for rules that give weights"):
        Balancer(TASKS, gradient="graddrop").backward(losses, shared=model.trunk.parameters(), measure=last)
    with pytest.raises(ValueError, match='measure is for source="parameters"'):
        Balancer(TASKS, gradient="mgda", source="features").backward(losses, features=z, measure=last)
    with pytest.raises(ValueError, match="of its 2 that require a gradient 0 are in shared"):
        Balancer(TASKS, gradient="mgda").backward(losses, shared=model.trunk.parameters(), measure=model.heads[0].parameters())
    with pytest.raises(ValueError, match="measure must hold parameters, but is empty"):
        Balancer(TASKS, gradient="mgda").backward(losses, shared=model.trunk.parameters(), measure=[])
    assert all(p.grad is None for p in model.parameters())


def nested(model):
    """Features of which one is computed from the other."""
    torch.manual_seed(7)
    first = model.trunk[:4](model.x)
    second = model.trunk[4:](first)
    outputs = [head(first if k == 0 else second) for k, head in enumerate(model.heads)]
    return [first, second], named([output.square().mean() for output in outputs])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_features_that_are_no_boundary_change_nothing(way):
    """Features computed from one another, or that some path goes around, are not where passes can begin."""
    for make in (nested, lambda model: (nested(model)[0][1], nested(model)[1])):
        results = []
        for hint in (False, True):
            model = network("mlp")
            z, losses = make(model) if hint else nested(model)
            if hint and not isinstance(z, list):
                torch.manual_seed(7)
                z, losses = nested(model)
                z = z[1]
            Balancer(TASKS, gradient=in_proportion, heads="weighted", **way).backward(
                losses, shared=model.trunk.parameters(), features=z if hint else None
            )
            results.append(grads(model))
        for name, gradient in results[0].items():
            if gradient is None:
                assert results[1][name] is None
            else:
                torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-13)


def test_features_may_differ_between_tasks():
    """Every task may use some of the features only; the direction is the gradient of the weighted losses."""
    model = network("mlp")
    torch.manual_seed(7)
    z = model.trunk(model.x)
    features = {"low": z[:, :12] + 0, "high": {"one": z[:, 12:] + 0}}
    low, high = features["low"], features["high"]["one"]
    losses = {"a": low.square().mean(), "b": high.sin().mean(), "c": (low * high).mean()}
    parts = [torch.autograd.grad(loss, [low, high], retain_graph=True, materialize_grads=True) for loss in losses.values()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in parts])
    weights = in_proportion(J @ J.T)
    expected = torch.autograd.grad(
        sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)), model.trunk[0].weight, retain_graph=True
    )
    balancer = Balancer(TASKS, gradient=in_proportion, source="features")
    report = balancer.backward(losses, features=features)
    torch.testing.assert_close(report.gramian, J @ J.T)
    torch.testing.assert_close(model.trunk[0].weight.grad, expected[0])


def test_features_with_a_path_around_them():
    """With weights the step is still the gradient of the weighted losses; a direction of the features cannot be."""
    model = network("mlp")
    torch.manual_seed(7)
    first = model.trunk[:4](model.x)
    z = model.trunk[4:](first)
    losses = {"a": z.square().mean(), "b": z.sin().mean() + first.mean(), "c": z.mean()}
    with pytest.raises(ValueError, match="needs every path"):
        Balancer(TASKS, gradient="graddrop", source="features").backward(losses, features=z)
    expected = torch.autograd.grad(sum(losses.values()), model.trunk[0].weight, retain_graph=True)[0]
    Balancer(TASKS, gradient=lambda G: torch.ones(3), source="features").backward(losses, features=z)
    torch.testing.assert_close(model.trunk[0].weight.grad, expected)


@pytest.mark.parametrize("source", ["parameters", "features"])
def test_partition_graph_divides_all_trainable_leaves(source):
    model = network("frozen")
    z, losses = model.losses()
    parts = partition_graph(source, losses, model.trunk.parameters(), z, None, [])
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].partition(".")[0] for p in parts.trunk} == {"trunk"}
    assert {names[id(p)].partition(".")[0] for p in parts.heads} == {"heads", "common"}
    assert [tensor is z for tensor in parts.features] == [True]
    assert [tensor is z for tensor in parts.inputs] == [True] if source == "features" else parts.inputs == parts.trunk
    assert all(p.requires_grad for p in (*parts.trunk, *parts.heads))
    assert parts.is_disjoint  # two heads share a layer, but no operation


def test_partition_is_not_disjoint_if_tasks_share_an_operation_above_the_features():
    model = network("mlp")
    z, (first, *others) = model.losses()
    parts = partition_graph("features", [first, first + others[0]], None, z, None, [])
    assert not parts.is_disjoint


def test_partition_graph_leaves_out_parameters_of_the_balancer():
    model = network("mlp")
    _, losses = model.losses()
    own = torch.ones((), requires_grad=True)
    parts = partition_graph("parameters", [own * loss for loss in losses], model.trunk.parameters(), None, None, [own])
    assert not any(p is own for p in (*parts.trunk, *parts.heads))


def test_read_shared_returns_each_trainable_parameter_once():
    frozen, first, second = (torch.ones(2, requires_grad=k > 0) for k in range(3))
    assert [id(p) for p in read_shared(iter([first, frozen, second, first]))] == [id(first), id(second)]
    assert read_shared([frozen]) == []


@pytest.mark.parametrize(
    ("shared", "error", "message"),
    [
        (None, TypeError, "but got nothing. Use shared=model.trunk.parameters"),
        (torch.ones(2), TypeError, "must be an iterable of parameters, but got Tensor"),
        ([], ValueError, "is empty. If it is a generator that was used up, give a list"),
        (["weight"], TypeError, "but got str"),
        ([torch.ones(2, requires_grad=True) * 2], TypeError, "but got a computed tensor"),
        ([torch.ones(2, dtype=torch.complex64, requires_grad=True)], TypeError, "must hold real parameters"),
    ],
)
def test_read_shared_refuses_other_values(shared, error, message):
    with pytest.raises(error, match=message):
        read_shared(shared)


def test_read_features_flattens_nested_structures_in_order():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = read_features({"second": [b, (a, None)], "first": {"inner": c}, "again": a})
    assert [id(z) for z in found] == [id(b), id(a), id(c)]


@pytest.mark.parametrize(
    ("features", "value"),
    [(None, "nothing"), ([], "nothing"), (torch.ones(2), "a tensor that requires none"), ({"z": [1.5]}, "float")],
)
def test_read_features_refuses_other_values(features, value):
    with pytest.raises(ValueError, match=f"tensor or several that require gradients, but got {value}. Give the output"):
        read_features(features)
