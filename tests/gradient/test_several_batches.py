import pytest
import torch

from balance.solvers.min_norm import min_norm_weights
from balance.testing import make_jacobian
from tests.gradient.directions import build

A = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)  # of two batches: not symmetric


def test_modo_descends_on_the_products_of_two_batches():
    rule = build("modo", 2, lr=0.01, rho=0.0)
    weights = rule(torch.eye(2), cross=A)
    step = 0.01 * A @ torch.tensor([0.5, 0.5], dtype=torch.float64)
    expected = 0.5 - (step - step.mean())
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)


def test_sdmgrad_descends_on_the_products_of_two_batches():
    rule = build("sdmgrad", 2, lam=0.5, lr=0.1, steps=1)
    weights = rule(torch.eye(2, dtype=torch.float64), cross=A)
    scale = ((1 + 0.5**0.5) / 2) ** 2
    step = 0.1 * A @ torch.full((2,), 0.75, dtype=torch.float64) / scale  # at w + lambda / K
    w = 0.5 - (step - step.mean())
    torch.testing.assert_close(weights, (w + 0.25) / 1.5)


def test_without_products_all_batches_are_the_same():
    J = make_jacobian(3, "generic", 0)
    for name in ("modo", "sdmgrad"):
        assert torch.equal(build(name, 3)(J @ J.T), build(name, 3)(J @ J.T, cross=J @ J.T))


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_wrong_products_are_refused(name):
    with pytest.raises(ValueError, match=r"cross must be finite with shape \(2, 2\)"):
        build(name, 2)(torch.eye(2), cross=torch.eye(3))
    with pytest.raises(ValueError, match="cross must be finite"):
        build(name, 2)(torch.eye(2), cross=torch.eye(2) * torch.nan)


@pytest.mark.parametrize(("name", "options"), [("modo", {"lr": 0.02, "rho": 0.0}), ("sdmgrad", {"lam": 0.0, "lr": 0.3})])
def test_weights_of_one_problem_approach_those_of_mgda(name, options):
    J = make_jacobian(4, "generic", 2)
    rule = build(name, 4, **options)
    for _ in range(3000):
        weights = rule(J @ J.T)
    torch.testing.assert_close(weights, torch.from_numpy(min_norm_weights((J @ J.T).numpy())), rtol=0, atol=1e-4)


def test_weights_of_no_gradients_keep_their_values():
    rule = build("sdmgrad", 2)
    rule(torch.diag(torch.tensor([1.0, 4.0])))
    before = rule.weights.clone()
    rule(torch.zeros(2, 2))
    assert torch.equal(rule.weights, before)
    rule(torch.eye(2), cross=-torch.eye(2))  # no gradient has a length
    assert torch.equal(rule.weights, before)
    assert rule(torch.eye(1), present=torch.tensor([0])).item() == 1
