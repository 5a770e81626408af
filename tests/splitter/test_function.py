from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from balance import Splitter
from tests.splitter.views import ROTATABLE, TASKS, Network, assert_same, data, gradients, merged, modes, name_of, splitter_of


def test_several_splitters_one_below_the_other():
    """Rules with constant weights are linear, so the result is known: at every place what the splitters above have made."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(2))
    outer = Splitter(("a", "rest"), gradient=lambda G: torch.tensor([2.0, 3.0]).to(G))
    inner = Splitter(("b", "c"), gradient=lambda G: torch.tensor([5.0, 7.0]).to(G))
    x = torch.randn(6, 4, dtype=torch.float64)

    def losses(split):
        views = outer(first(x)) if split else dict.fromkeys(("a", "rest"), first(x))
        deep = second(views["rest"])
        below = inner(deep) if split else dict.fromkeys(("b", "c"), deep)
        return views["a"].square().mean(), below["b"].exp().mean(), below["c"].sin().mean()

    sum(losses(split=True)).backward()
    a, b, c = losses(split=False)
    expected = torch.autograd.grad(2 * a + 3 * (5 * b + 7 * c), list(first.parameters()))
    expected += torch.autograd.grad(5 * losses(split=False)[1] + 7 * losses(split=False)[2], list(second.parameters()))
    for p, gradient in zip([*first.parameters(), *second.parameters()], expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_one_splitter_used_twice_in_a_forward_pass_counts_both():
    splitter = Splitter(2)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    sum((view * (k + 1)).sum() for _ in range(2) for k, view in enumerate(splitter(x).values())).backward()
    assert splitter.counts.tolist() == [2, 2]


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "pack", [tuple, list, lambda p: Pair(*p), lambda p: {"left": p[0], "right": [p[1]]}], ids=["tuple", "list", "named", "dict"]
)
@pytest.mark.parametrize("mode", ROTATABLE, ids=name_of)
def test_several_feature_tensors_are_balanced_as_one(mode, pack):
    J = gradients(2, 3, 4, 10)
    whole = merged(splitter_of(TASKS, mode), J)
    pieces = [torch.zeros(4, 3, 2, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)]
    for piece in pieces:
        piece.requires_grad_()
    views = splitter_of(TASKS, mode)(pack(pieces))
    total = 0
    for task, rows in zip(TASKS, J, strict=True):
        left, right = views[task].values() if isinstance(views[task], dict) else views[task]
        right = right[0] if isinstance(right, list) else right
        total = total + (left.flatten(1) * rows[:, :6]).sum() + (right * rows[:, 6:]).sum()
    total.backward()
    assert type(views["a"]) is type(pack(pieces))
    torch.testing.assert_close(torch.cat([pieces[0].grad.flatten(1), pieces[1].grad], dim=1), whole)


def test_a_tensor_given_twice_is_one_and_one_without_gradient_is_handed_through():
    J = gradients(4, 2)
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 3)
    views = Splitter(2)((x, mask, x))
    assert views["0"][1] is mask
    sum((views[str(k)][0] * J[k] / 2 + views[str(k)][2] * J[k] / 2).sum() for k in range(2)).backward()
    torch.testing.assert_close(x.grad, merged(Splitter(2), J))


def test_a_feature_that_no_task_reaches_gets_no_gradient():
    x, y = (torch.zeros(4, 3, requires_grad=True) for _ in range(2))
    views = Splitter(2, gradient="mgda")([x, y])
    (views["0"][0].sum() + views["1"][0].sum()).backward()
    assert x.grad is not None
    assert y.grad is None


def test_a_view_may_be_used_twice():
    J = gradients(5, 2)
    x = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    views = Splitter(2, gradient="imtl")(x)
    (sum((views["0"] * J[0] / 2).sum() for _ in range(2)) + (views["1"] * J[1]).sum()).backward()
    torch.testing.assert_close(x.grad, merged(Splitter(2, gradient="imtl"), J))


def test_views_cannot_be_changed_in_place():
    """They share their memory: a ReLU in place of one task would change what the others see."""
    views = Splitter(2)(torch.randn(3, 2, requires_grad=True) * 2)
    with pytest.raises(RuntimeError, match="inplace"):
        nn.functional.relu(views["0"], inplace=True)


def test_below_a_checkpoint():
    x = data()
    network, twin = Network(Splitter(TASKS)), Network(Splitter(TASKS))
    sum(network.losses(x).values()).backward()
    checkpoint(lambda: sum(twin.losses(x).values()), use_reentrant=False).backward()
    assert_same(twin.grads(), network.grads(), rtol=0, atol=0)
    assert twin.splitter.counts.tolist() == [1, 1, 1]


@modes
@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (0, 3)], ids=str)
def test_any_shape_of_features(mode, shape):
    J = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = merged(splitter_of(TASKS, mode), J)
    assert direction.shape == shape
    assert direction.isfinite().all()


def test_one_dimension_is_a_sample_of_one_number():
    torch.testing.assert_close(
        merged(Splitter(2), gradients(1, 2, 4, 1)[:, :, 0]), merged(Splitter(2), gradients(1, 2, 4, 1))[:, 0]
    )


@modes
def test_one_task(mode):
    g = gradients(0, 1)
    direction = merged(splitter_of(1, mode), g)
    norm = g[0].square().sum(dim=1).mean().sqrt()
    factor = {
        "normalized": 1 / norm,
        "cagrad": (1 + 0.4) / (1 + 0.4**2),
        "nashmtl": 1 / g.norm(),
        "ema_norm": 1 / g.norm(),
        "every": 1 / g.norm(),
    }
    torch.testing.assert_close(direction, g[0] * factor.get(mode.get("gradient", "normalized"), 1.0))


@modes
def test_zero_gradients(mode):
    splitter = splitter_of(TASKS, mode)
    assert not merged(splitter, torch.zeros(3, 4, 3)).any()
    assert splitter.counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", [{}, {"gradient": "mgda"}], ids=name_of)
def test_a_reentrant_checkpoint_around_the_splitter(mode):
    """Its first forward pass is without gradients, and must return a tensor for every task."""
    network, twin = (Network(splitter_of(TASKS, mode)) for _ in range(2))
    x = data().requires_grad_()
    views = checkpoint(lambda x: tuple(network.splitter(network.trunk(x)).values()), x, use_reentrant=True)
    outputs = {task: network.heads[task](view) for task, view in zip(TASKS, views, strict=True)}
    sum((y - i).square().mean() * 10**i for i, y in enumerate(outputs.values())).backward()
    sum(twin.losses(data()).values()).backward()
    assert_same(network.grads(), twin.grads(), rtol=0, atol=0)


def test_evaluation_and_no_grad_give_the_features():
    splitter = Splitter(TASKS)
    x = torch.randn(3, 2, requires_grad=True)
    with torch.no_grad():
        views = splitter({"x": x})
        assert len({id(view["x"]) for view in views.values()}) == len(TASKS)
        assert all(view["x"].data_ptr() == x.data_ptr() for view in views.values())
        assert all(torch.equal(view["x"], x) for view in views.values())
    assert splitter(x.detach())["a"].requires_grad is False
    splitter.eval()
    views = splitter([x])
    assert views["b"][0] is x
    sum(view[0].sum() for view in views.values()).backward()
    assert (x.grad == 3).all()
