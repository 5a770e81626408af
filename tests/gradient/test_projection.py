import numpy as np
import pytest
import torch
from hypothesis import given

from balance import gradient_balancers
from balance.gradient.projection import orders_of_visits, project_conflicts
from balance.testing import make_jacobian
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


@pytest.mark.parametrize("kind", ["generic", "zero_row", "opposite"])
@pytest.mark.parametrize("num_tasks", [8, 9, 40, 41])
def test_many_tasks_take_their_turns_together(num_tasks, kind):
    J = make_jacobian(num_tasks, kind, 0)
    orders = orders_of_visits(num_tasks, "random", gradient_balancers.build("pcgrad").random)
    weights = torch.from_numpy(project_conflicts((J @ J.T).numpy(), orders))
    torch.testing.assert_close(weights @ J, on_vectors(J, orders), rtol=1e-8, atol=1e-8)


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


def vaccinated(J, orders, targets, beta):
    """GradVac as the paper writes it, on the gradients themselves; the targets change in place."""
    total = torch.zeros(J.shape[1], dtype=J.dtype)
    for i, order in enumerate(orders):
        v = J[i].clone()
        for j in order:
            cosine = v @ J[j] / v.norm() / J[j].norm()
            target = targets[i, j].clone()
            if cosine < target:
                up, down = target * (1 - cosine**2) ** 0.5, cosine * (1 - target**2) ** 0.5
                v = v + v.norm() * (up - down) / (J[j].norm() * (1 - target**2) ** 0.5) * J[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        total += v
    return total


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 9, 50])
def test_gradvac_follows_the_definition_over_steps(num_tasks, beta):
    rule, same = (gradient_balancers.build("gradvac", num_tasks=num_tasks, beta=beta, seed=3) for _ in range(2))
    targets = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    common = make_jacobian(num_tasks, "generic", 9)
    for seed in range(6):
        J = make_jacobian(num_tasks, "generic", seed) + common
        orders = orders_of_visits(num_tasks, "random", same.random)
        torch.testing.assert_close(rule(J @ J.T) @ J, vaccinated(J, orders, targets, beta), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(rule.targets, targets, rtol=1e-8, atol=1e-8)


def test_gradvac_starts_as_pcgrad():
    J = make_jacobian(6, "generic", 0)
    first = gradient_balancers.build("gradvac", num_tasks=6, seed=2)(J @ J.T)
    torch.testing.assert_close(first, gradient_balancers.build("pcgrad", seed=2)(J @ J.T))


def test_gradvac_keeps_the_targets_of_absent_tasks_and_of_zero_gradients():
    rule, small = gradient_balancers.build("gradvac", num_tasks=3), gradient_balancers.build("gradvac", num_tasks=2)
    for seed in range(3):
        J = make_jacobian(2, "generic", seed)
        torch.testing.assert_close(rule(J @ J.T, present=torch.tensor([0, 2])), small(J @ J.T))
    assert not rule.targets[1].any()
    assert not rule.targets[:, 1].any()
    before = rule.targets.clone()
    assert rule(torch.diag(torch.tensor([0.0, 1.0, 0.0]))).tolist() == [1, 1, 1]
    assert torch.equal(rule.targets, before)


def test_gradvac_of_equal_gradients_that_part_stays_finite():
    """After many equal steps the target rounds to 1, which no finite step reaches."""
    rule = gradient_balancers.build("gradvac", num_tasks=2)
    for _ in range(100):
        assert rule(torch.ones(2, 2, dtype=torch.float64)).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert rule(torch.eye(2, dtype=torch.float64)).isfinite().all()
    assert (rule.targets.abs() <= 1).all()


def test_gradvac_of_opposite_gradients_learns_no_target_from_rounding():
    rule = gradient_balancers.build("gradvac", num_tasks=3, order="fixed")
    J = torch.tensor([[0.1, 0.7], [-0.3, -2.1], [0.0, 1.0]], dtype=torch.float64)
    assert rule(J @ J.T).isfinite().all()
    assert rule.targets[0].tolist() == pytest.approx([0, -0.5, 0])  # the first vector is zero when it meets the third


def test_gradvac_resumes_from_a_state_dict_bit_for_bit():
    rule, resumed = (gradient_balancers.build("gradvac", num_tasks=4, seed=seed) for seed in (0, 1))
    gramians = [J @ J.T for J in (make_jacobian(4, "generic", seed) for seed in range(6))]
    for G in gramians[:3]:
        rule(G)
    resumed.load_state_dict(rule.state_dict())
    for G in gramians[3:]:
        assert torch.equal(rule(G), resumed(G))
