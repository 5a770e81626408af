import numpy as np
import pytest
import torch
from hypothesis import given

from balance import gradient_balancers
from balance.gradient.projection import project_conflicts
from tests.strategies import SEEDS, jacobians


def on_vectors(J, orders):
    """PCGrad as the paper writes it, on the gradients themselves."""
    total = torch.zeros(J.shape[1], dtype=J.dtype)
    for i, order in enumerate(orders):
        v = J[i].clone()
        for j in order:
            product = v @ J[j]
            if product < 0:
                v = v - product / (J[j] @ J[j]) * J[j]
        total += v
    return total


@given(jacobians(min_tasks=2, kinds=("generic", "integer", "zero_row", "opposite")), SEEDS)
def test_it_is_a_function_of_the_gramian(J, seed):
    """Coefficients on the Gramian give the direction that projecting the gradients gives."""
    random = np.random.default_rng(seed)
    orders = np.array([[j for j in random.permutation(len(J)) if j != i] for i in range(len(J))])
    # on integers an inner product that is exactly zero may come out as rounding of either sign: no projection to speak of
    weights = torch.from_numpy(project_conflicts((J @ J.T).numpy(), orders))
    torch.testing.assert_close(weights @ J, on_vectors(J, orders), rtol=1e-8, atol=1e-8 * float(J.norm()) + 1e-12)


@given(jacobians(min_tasks=2, max_tasks=2, kinds=("generic", "integer", "opposite")))
def test_two_tasks_never_conflict_after_it(J):
    d = gradient_balancers.build("pcgrad")(J @ J.T) @ J
    assert (J @ d >= -1e-9 * J.norm() ** 2).all()


def test_orders_are_drawn_uniformly_and_exclude_the_task_itself():
    rule = gradient_balancers.build("pcgrad", seed=1)
    orders = np.stack([rule._orders(3) for _ in range(600)])
    for i in range(3):
        others = sorted({0, 1, 2} - {i})
        assert (np.sort(orders[:, i], axis=1) == others).all()
        assert 240 < (orders[:, i, 0] == others[0]).sum() < 360


def test_a_gradient_is_not_projected_off_itself():
    """By hand. Codes that also visit j = i turn the third gradient once more, and end at [-21/11, 0, -21/11]."""
    J = torch.tensor([[1, 3, 1], [-3, 3, -3], [0, -3, 0]], dtype=torch.float64)
    d = gradient_balancers.build("pcgrad", order="fixed")(J @ J.T) @ J
    assert d.tolist() == pytest.approx([-21 / 11, 2 / 11, -21 / 11])


ON_GRAMIANS = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == "gramian"]


@pytest.mark.parametrize("name", ON_GRAMIANS)
@pytest.mark.parametrize(
    "gramian", [torch.ones(2), torch.ones(2, 3), torch.zeros(0, 0), torch.ones(2, 2, 1), torch.full((2, 2), torch.nan)]
)
def test_a_gramian_that_is_none_is_told(name, gramian):
    with pytest.raises(ValueError, match="gramian must"):
        gradient_balancers.build(name, num_tasks=2)(gramian)


@pytest.mark.parametrize("name", ON_GRAMIANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_have_the_dtype_of_the_gramian_but_are_solved_in_float64(name, dtype):
    G = torch.tensor([[4.0, -1.0], [-1.0, 2.0]])
    weights = gradient_balancers.build(name, num_tasks=2)(G.to(dtype))
    assert weights.dtype == dtype
    assert torch.equal(weights, gradient_balancers.build(name, num_tasks=2)(G.double()).to(dtype))
