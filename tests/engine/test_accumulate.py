"""``.grad`` is as autograd would have written it: strides, dtype, sparse layout, accumulation, for every optimizer."""

import inspect

import pytest
import torch
from torch import nn

from balance import Balancer
from balance.engine.accumulate import (
    accumulate,
    accumulate_reduced,
    are_finite,
    cleared_grads,
    gradient_sum,
    leaf_gradients,
    merged_pairs,
    without_hooks,
)

OPTIMIZERS = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and cls is not torch.optim.Optimizer}
FLAGS = [
    (name, flag)
    for name, cls in OPTIMIZERS.items()
    for flag in ("plain", "foreach", "fused")
    if name not in ("SparseAdam", "LBFGS") and (flag == "plain" or flag in inspect.signature(cls).parameters)
]
FUSED_ON_CPU = {"Adam", "AdamW", "SGD", "Adagrad"}


def ones(gramian):
    return torch.ones(len(gramian), dtype=gramian.dtype)


class Mixed(nn.Module):
    """Parameters in every memory layout: channels_last, transposed, expanded gradients, scalars."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(
            memory_format=torch.channels_last
        )
        self.transposed = nn.Parameter(torch.randn(8, 6).t())
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.heads = nn.ModuleList([nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)]).to(memory_format=torch.channels_last)

    def losses(self, x):
        z = self.trunk(x) * self.scale
        outputs = [head(z) for head in self.heads]
        mixed = torch.einsum("bchw,oc->bohw", z, self.transposed)
        return {"a": outputs[0].square().mean() + mixed.mean(), "b": (outputs[1] - 1).square().mean() + mixed.square().mean()}

    def shared(self):
        return [*self.trunk.parameters(), self.transposed, self.scale]


def stepped(optimizer, flag, balanced):
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if optimizer != "Muon" or p.ndim == 2]
    options = {flag: True} if flag != "plain" else {}
    stage = OPTIMIZERS[optimizer](parameters, lr=0.01, **options)
    for _ in range(2):
        stage.zero_grad()
        losses = model.losses(x)
        if balanced:
            Balancer(("a", "b"), gradient=ones).backward(losses, shared=model.shared())
        else:
            sum(losses.values()).backward()
        assert all(p.grad.stride() == p.stride() and p.grad.dtype == p.dtype for p in model.parameters())
        stage.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("optimizer", "flag"), FLAGS)
def test_every_optimizer_makes_the_step_of_an_ordinary_backward_pass(optimizer, flag):
    if flag == "fused" and optimizer not in FUSED_ON_CPU:
        pytest.skip("no fused kernel on a CPU")
    for balanced, plain in zip(stepped(optimizer, flag, True), stepped(optimizer, flag, False), strict=True):
        # signs of gradients that are zero but for rounding decide in some optimizers
        assert (balanced - plain).abs().median() <= 1e-5
        assert torch.quantile((balanced - plain).abs().flatten(), 0.95) <= 1e-3


@pytest.mark.parametrize("way", [{}, {"memory": "gramian"}], ids=str)
def test_sparse_gradients_stay_sparse_where_all_of_them_are(way):
    torch.manual_seed(0)
    table, dense, heads = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
    index = torch.tensor([3, 3, 7, 11])

    def losses():
        z = dense(table(index)).tanh()
        return {str(k): (h(z[k : k + 2]) - k).square().mean() for k, h in enumerate(heads)}

    J = []
    for loss in losses().values():
        row = torch.autograd.grad(loss, [table.weight, *dense.parameters()], retain_graph=True)
        J.append(torch.cat([g.to_dense().flatten() for g in row]))
    J = torch.stack(J).double()
    report = Balancer(3, gradient="nashmtl", **way).backward(losses(), shared=[*table.parameters(), *dense.parameters()])
    torch.testing.assert_close(report.gramian, J @ J.T, rtol=1e-5, atol=1e-9)
    assert table.weight.grad.is_sparse
    assert table.weight.grad.coalesce().indices().tolist() == [[3, 7, 11]]
    want = (report.gradient_weights.double() @ J)[:200].view(50, 4)
    torch.testing.assert_close(table.weight.grad.to_dense().double(), want, rtol=1e-4, atol=1e-7)
    torch.optim.SparseAdam(table.parameters()).step()


def test_a_rule_that_sees_the_jacobian_gives_a_sparse_gradient_to_a_sparse_table():
    table = nn.Embedding(20, 3, sparse=True)
    z = table(torch.tensor([2, 5]))
    Balancer(2, gradient="graddrop", gradient_options={"leak": 1.0}).backward(
        torch.stack([z.sum(), z.square().sum()]), shared=table.parameters()
    )
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense()[[2, 5]], 1 + 2 * z.detach())


@pytest.mark.parametrize("gradient", ["weights", "direction"])
def test_a_dense_contribution_makes_the_gradient_dense(gradient):
    table = nn.Embedding(6, 3, sparse=True)
    z = table(torch.tensor([0, 2]))
    rule = {"gradient": ones} if gradient == "weights" else {"gradient": "graddrop", "gradient_options": {"leak": 1.0}}
    Balancer(2, **rule).backward({"0": z.sum(), "1": table.weight.sum()}, shared=table.parameters())
    assert not table.weight.grad.is_sparse
    assert table.weight.grad[:, 0].tolist() == [2, 1, 2, 1, 1, 1]


@pytest.mark.parametrize("order", [("sparse", "dense"), ("dense", "sparse"), ("sparse", "sparse")])
def test_a_table_that_is_a_head_of_two_tasks_takes_either_layout(order):
    table, shared = nn.Embedding(4, 2, sparse=True), torch.ones(2, requires_grad=True)
    parts = {"sparse": table(torch.tensor([1])).sum(), "dense": table.weight.sum()}
    losses = {str(k): shared.sum() + parts[kind] for k, kind in enumerate(order)}
    Balancer(2, gradient="pcgrad").backward(losses, shared=[shared])
    assert table.weight.grad.is_sparse == ("dense" not in order)
    assert table.weight.grad.to_dense()[:, 0].tolist() == ([0, 2, 0, 0] if "dense" not in order else [1, 2, 1, 1])


def test_accumulate_adds_in_place_to_an_existing_gradient():
    weight = nn.Parameter(torch.randn(3, 4))
    weight.grad = before = torch.ones(3, 4)
    accumulate([(weight, torch.ones(3, 4))])
    assert weight.grad is before
    assert before.unique().tolist() == [2]


def test_accumulate_makes_a_gradient_grad_without_a_copy():
    weight = nn.Parameter(torch.randn(300, 400))
    gradients = [torch.ones(300, 400)]
    address = gradients[0].data_ptr()
    accumulate([(weight, gradients.pop())])
    assert weight.grad.data_ptr() == address


def test_leaf_gradients_leaves_out_none():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert [leaf is b for leaf, _ in leaf_gradients([a, b], [None, torch.ones(2)])] == [True]


def test_are_finite_looks_at_entries_and_not_at_their_sum():
    assert are_finite([torch.full((4,), 2e38)])  # whose sum overflows
    assert not are_finite([torch.ones(2), torch.tensor([1.0, torch.inf])])
    assert not are_finite([torch.tensor([1j * torch.nan])])
    assert are_finite([])


def test_gradient_sum_is_sparse_if_both_are():
    sparse, dense = torch.sparse_coo_tensor([[1]], [1.0], (2,), check_invariants=True), torch.ones(2)
    assert [gradient_sum(x, y).is_sparse for x in (sparse, dense) for y in (sparse, dense)] == [True, False, False, False]
    assert gradient_sum(sparse, dense).tolist() == [1, 2]


def test_cleared_grads_restores_them_after_an_error():
    leaf = nn.Parameter(torch.ones(2))
    leaf.grad = before = torch.zeros(2)
    with pytest.raises(RuntimeError, match="here"), cleared_grads([leaf]):
        assert leaf.grad is None
        raise RuntimeError("here")
    assert leaf.grad is before


def test_without_hooks_restores_hooks_in_their_order():
    a = torch.ones(2, requires_grad=True)
    calls = []
    a.register_hook(lambda _: calls.append(1))
    handle = a.register_hook(lambda _: calls.append(2))
    with without_hooks([a]):
        a.sum().backward()
        a.register_hook(lambda _: calls.append(3))
    assert not calls
    a.sum().backward()
    assert calls == [1, 2, 3]
    handle.remove()
    a.sum().backward()
    assert calls == [1, 2, 3, 1, 3]


def leaves_with_hooks(calls):
    """Leaf tensors of several layouts and their gradients; hooks double a gradient and note the final one."""
    channels_last = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    half, table, plain = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(5, 2), torch.zeros(4)
    leaves = [channels_last, *(leaf.requires_grad_() for leaf in (half, table, plain))]
    plain.register_hook(lambda gradient: 2 * gradient)
    plain.register_hook(lambda gradient: gradient + 1)
    plain.register_post_accumulate_grad_hook(lambda leaf: calls.append(leaf.grad.clone()))
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 2), (5, 2), check_invariants=True)
    return leaves, [torch.ones(2, 3, 4, 4), torch.full((3,), 0.5), sparse, torch.arange(4.0)]


@pytest.mark.parametrize("times", [1, 2])
def test_reduced_gradients_are_added_as_by_a_backward_pass(times):
    results = []
    for add in (accumulate, accumulate_reduced):
        calls = []
        leaves, gradients = leaves_with_hooks(calls)
        for _ in range(times):
            add(zip(leaves, gradients, strict=True))
        results.append((leaves, calls))
    for leaf, other in zip(results[0][0], results[1][0], strict=True):
        assert (leaf.grad.dtype, leaf.grad.is_sparse) == (other.grad.dtype, other.grad.is_sparse)
        assert leaf.grad.is_sparse or leaf.grad.stride() == other.grad.stride()
        assert torch.equal(leaf.grad.to_dense(), other.grad.to_dense())
    assert len(results[1][1]) == times
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_reduced_gradients_pass_by_the_hooks_of_wrappers():
    leaf, calls = torch.zeros(2, requires_grad=True), []
    node = torch.autograd.graph.get_gradient_edge(leaf).node  # where DistributedDataParallel has its hooks
    node.register_hook(lambda *_: calls.append(1))
    accumulate_reduced([(leaf, torch.ones(2))])
    assert (leaf.grad.tolist(), calls) == ([1, 1], [])
    accumulate([(leaf, torch.ones(2))])
    assert (leaf.grad.tolist(), calls) == ([2, 2], [1])


def test_pairs_are_merged_by_leaf():
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    pairs = merged_pairs([(a, torch.ones(2))], [(b, torch.ones(1)), (a, torch.ones(2))])
    assert [(leaf is a, gradient.tolist()) for leaf, gradient in pairs] == [(True, [2, 2]), (False, [1])]
