"""Arguments of a step: an extra loss that no rule sees, numbers of samples, and a factor on .grad."""

import pytest
import torch

from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same

OPTIONS = ({}, {"loss": "uw"}, {"gradient": "nashmtl"}, {"gradient": "graddrop"}, {"gradient": "mgda", "source": "features"})


@pytest.mark.parametrize("kind", ["of the parameters", "of the features"])
@pytest.mark.parametrize("options", [*OPTIONS, {"gradient": "mgda", "memory": "gramian"}], ids=str)
def test_an_extra_loss_is_added_after_the_rules(options, kind):
    def step(with_extra):
        network, balancer = Network(), Balancer(TASKS, **options)
        z = network.trunk(network.x)
        given = {"features": z} if "source" in options else {}
        extra = sum(p.square().sum() for p in network.parameters()) if kind == "of the parameters" else z.square().mean()
        report = balancer.backward(
            network.losses(z), shared=network.shared(), factor=0.5, extra=3 * extra if with_extra else None, **given
        )
        return network, report

    network, report = step(with_extra=True)
    plain, expected = step(with_extra=False)
    z = plain.trunk(plain.x)
    extra = sum(p.square().sum() for p in plain.parameters()) if kind == "of the parameters" else z.square().mean()
    (0.5 * 3 * extra).backward()
    assert_same(network.grads(), plain.grads(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report.loss_weights, expected.loss_weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"gradient": "mgda"}, {"gradient": "pcgrad", "loss": "uw"}], ids=str)
def test_an_extra_loss_that_is_not_finite(options):
    network, balancer = Network(), Balancer(TASKS, **options)
    extra = network.trunk[0].weight.sum() * torch.inf
    with pytest.raises(ValueError, match="gradients of extra must be finite"):
        balancer.backward(network.losses(), shared=network.shared(), extra=extra)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (0.5, TypeError, "extra must be a scalar tensor of floats, but got float"),
        (torch.zeros(2, requires_grad=True), ValueError, "has shape \\(2,\\)"),
        (torch.zeros(()), ValueError, "requires_grad=False"),
    ],
)
def test_wrong_extra_losses(extra, error, message):
    network = Network()
    with pytest.raises(error, match=message):
        Balancer(TASKS).backward(network.losses(), extra=extra)


def test_a_task_without_samples_is_absent():
    network, balancer = Network(), Balancer(TASKS, gradient="mgda")
    losses = network.losses()
    losses["b"] = losses["b"] * torch.nan  # the mean of no samples
    report = balancer.backward(losses, shared=network.shared(), counts={"a": 3, "b": 0})
    assert report.tasks == ("a", "c")
    other = Network()
    expected = other.losses()
    del expected["b"]
    Balancer(TASKS, gradient="mgda").backward(expected, shared=other.shared())
    assert_same(network.grads(), other.grads(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"d": 1}, "Unknown task in counts 'd'"),
        ({"a": -1}, "the count of task 'a' is -1"),
        ({"a": float("nan")}, "the count of task 'a' is nan"),
        ([1, 2], "counts must have a number for each of 3 tasks, but got 2"),
        ({"c": 4}, "Task 'c' has a count of 4 samples, but no loss"),
    ],
)
def test_wrong_counts(counts, message):
    network = Network()
    losses = network.losses()
    del losses["c"]
    with pytest.raises(ValueError, match=message):
        Balancer(TASKS).backward(losses, counts=counts)


def test_counts_as_a_tensor():
    report = Balancer(TASKS).backward(Network().losses(), counts=torch.tensor([2, 0, 1]))
    assert report.tasks == ("a", "c")


def test_a_factor_leaves_the_error_of_a_loss_that_is_not_finite():
    network, balancer = Network(), Balancer(TASKS, gradient="nashmtl")
    losses = network.losses()
    losses["a"] = losses["a"] * torch.nan
    with pytest.raises(ValueError, match="Losses must be finite"):
        balancer.backward(losses, shared=network.shared(), factor=0.5)
    assert all(p.grad is None for p in network.parameters())
