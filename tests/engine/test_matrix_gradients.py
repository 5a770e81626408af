"""Few gradients in one matrix: the same results as tensor by tensor."""

import pytest
import torch
from torch import nn

from balance import Balancer
from balance.engine import engine as engine_module
from balance.engine.matrix_gradients import is_small
from balance.engine.partition import partition_graph
from tests.engine.definition import grads, in_proportion


class Network(nn.Module):
    """A trunk with a layer that only two tasks use, a table, and a head that two tasks share."""

    def __init__(self, *, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.low, self.branch = nn.Embedding(7, 5, sparse=sparse), nn.Linear(5, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, n) for n in (1, 2, 3))
        self.unused = nn.Linear(4, 4)
        self.double()

    def losses(self):
        """Return the losses by name."""
        z = self.low(self.table(torch.tensor([1, 3, 3]))).tanh()
        branch = self.branch(z).tanh()
        outputs = [self.heads[0](z), self.heads[1](branch), self.heads[2](branch) + self.heads[0](z)]
        return {task: (y - k).square().mean() for k, (task, y) in enumerate(zip("abc", outputs, strict=True))}

    @property
    def shared(self):
        """All parameters except for the heads."""
        return [p for module in (self.table, self.low, self.branch, self.unused) for p in module.parameters()]


def step(net, **options):
    net.zero_grad()
    report = Balancer(("a", "b", "c"), gradient=in_proportion, **options).backward(net.losses(), shared=net.shared)
    return report, grads(net)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
def test_one_matrix_equals_gradients_by_tensor(monkeypatch, heads, sparse):
    net = Network(sparse=sparse)
    report, gradients = step(net, heads=heads)
    monkeypatch.setattr(engine_module, "is_small", lambda *_, **__: False)
    expected_report, expected = step(net, heads=heads)
    torch.testing.assert_close(report.gramian, expected_report.gramian, rtol=1e-12, atol=1e-15)
    assert [g is None for g in gradients.values()] == [g is None for g in expected.values()]
    assert gradients["unused.weight"] is None
    assert gradients["table.weight"].is_sparse == sparse
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient.to_dense(), expected[name].to_dense(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_sparse_gradient_of_a_head_stays_sparse(engine):
    torch.manual_seed(0)
    trunk, head, table = nn.Linear(4, 3), nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True)
    z = trunk(torch.randn(2, 4)).tanh()
    losses = {"a": head(z).square().mean(), "b": (z * table(torch.tensor([1, 3]))).sum()}
    report = Balancer(("a", "b"), gradient=in_proportion, heads="weighted", engine=engine).backward(
        losses, shared=trunk.parameters(), features=z
    )
    assert table.weight.grad.is_sparse
    expected = torch.zeros(5, 3).index_copy(0, torch.tensor([1, 3]), float(report.gradient_weights[1]) * z.detach())
    torch.testing.assert_close(table.weight.grad.to_dense(), expected)


def test_a_gradient_is_a_tensor_of_its_own():
    """A view of the matrix would keep all of it in memory."""
    net = Network()
    step(net)
    for parameter in net.parameters():
        if parameter.grad is not None:
            assert parameter.grad.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
            assert parameter.grad._base is None


@pytest.mark.parametrize("place", ["low", "heads"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_named(number, place):
    net = Network()
    losses = net.losses()
    parameter = net.low.weight if place == "low" else net.heads[1].weight
    zeros = parameter - parameter.detach() if number == float("inf") else 0 * parameter
    losses["b"] = losses["b"] + zeros.sqrt().sum()
    with pytest.raises(ValueError, match="the gradients of b are not"):
        Balancer(("a", "b", "c"), gradient=in_proportion).backward(losses, shared=net.shared)
    assert all(p.grad is None for p in net.parameters())


def test_only_few_gradients_of_one_kind_are_kept_in_one_matrix():
    def small(width, num_tasks, *, batched, dtype=torch.float32, head=torch.float32):
        W, h = torch.ones(width, dtype=dtype, requires_grad=True), torch.ones(2, dtype=head, requires_grad=True)
        parts = partition_graph("parameters", [W.sum() + h.sum()], [W], None, None, [])
        return is_small(parts, num_tasks, batched=batched)

    assert small(1 << 15, 4, batched=False)
    assert not small(1 << 15, 5, batched=False)
    assert small(1 << 19, 4, batched=True)
    assert not small(1 << 19, 5, batched=True)
    assert not small(8, 2, batched=False, head=torch.float64)
    assert not small(8, 2, batched=False, dtype=torch.float16, head=torch.float16)
