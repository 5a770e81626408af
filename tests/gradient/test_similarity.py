import pytest
import torch

from balance import Balancer
from balance.gradient.similarity import mean_similarity
from balance.testing import make_jacobian
from tests.gradient.directions import build, direction


def by_definition(jacobians, gamma=0.7, beta1=0.9, beta2=0.99):
    """SAM-GS as the authors' code computes it, one step after the other."""
    m, v, directions = 0, 0, []
    for t, J in enumerate(jacobians, start=1):
        n = J.norm(dim=1)
        similar = [2 * n[i] * n[j] / (n[i] ** 2 + n[j] ** 2) for i in range(len(J)) for j in range(i)]
        psi = sum(similar) / len(similar)
        m = beta1 * m + (1 - beta1) * J
        v = beta2 * v + (1 - beta2) * (1 - psi) ** 2 + 1e-8
        if psi < gamma:
            directions.append(n.mean() * (J / n[:, None]).sum(dim=0))
        else:
            directions.append((J * (m / (1 - beta1**t)).abs()).sum(dim=0) / (v / (1 - beta2**t)) ** 0.5)
    return directions


@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.9, 1.0])
def test_it_follows_the_definition_over_steps(gamma):
    jacobians = [make_jacobian(4, "generic", seed) for seed in range(12)]
    rule = build("sam_gs", 4, gamma=gamma)
    for J, expected in zip(jacobians, by_definition(jacobians, gamma), strict=True):
        torch.testing.assert_close(rule(J), expected)


def test_similarity_of_lengths():
    assert mean_similarity(torch.tensor([1.0, 1.0])) == 1
    assert mean_similarity(torch.tensor([1.0, 3.0])) == pytest.approx(0.6)
    assert mean_similarity(torch.tensor([1.0, 3.0, 0.0])) == pytest.approx(0.2)
    assert mean_similarity(torch.tensor([0.0, 0.0])) == 1
    assert mean_similarity(torch.tensor([5.0])) == 1
    assert mean_similarity(torch.tensor([1e-200, 1e200], dtype=torch.float64)) == 0


def test_a_zero_gradient_contributes_nothing():
    assert direction("sam_gs", [[0.0, 0.0], [1.0, 2.0]]).isfinite().all()
    assert direction("sam_gs", [[0.0, 0.0], [0.0, 0.0]]).tolist() == [0, 0]


def test_absent_tasks_keep_their_averages():
    rule, small = build("sam_gs", 3), build("sam_gs", 2)
    for seed in range(4):
        J = make_jacobian(2, "generic", seed)
        torch.testing.assert_close(rule(J, present=torch.tensor([0, 2])), small(J))
    assert not rule.momentum[1].any()
    assert rule.steps.tolist() == [4, 0, 4, 4]


def test_it_resumes_from_a_state_dict_bit_for_bit():
    jacobians = [make_jacobian(3, "generic", seed) for seed in range(6)]
    rule, resumed = build("sam_gs", 3), build("sam_gs", 3)
    for J in jacobians[:3]:
        rule(J)
    assert all(isinstance(value, torch.Tensor) for value in rule.state_dict().values())
    resumed.load_state_dict(rule.state_dict())
    for J in jacobians[3:]:
        assert torch.equal(rule(J), resumed(J))
    resumed.load_state_dict(build("sam_gs", 3).state_dict())  # of a run that has not begun
    assert torch.equal(resumed(jacobians[0]), build("sam_gs", 3)(jacobians[0]))


def test_half_precision_is_averaged_in_single_precision():
    rule = build("sam_gs", 2)
    assert rule(torch.ones(2, 3, dtype=torch.float16)).dtype == torch.float16
    assert rule.momentum.dtype == torch.float32


def test_a_failed_step_leaves_no_state():
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))]
    balancer = Balancer(["a", "b"], gradient="sam_gs")

    def step(shared):
        balancer.backward(
            {"a": sum(p.square().sum() for p in parameters), "b": sum(p.sum() for p in parameters)}, shared=shared
        )

    step(parameters[:1])
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    with pytest.raises(ValueError, match="needs as many parameters as before, 2, but got 3"):
        step(parameters)
    after = balancer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_mistakes():
    rule = build("sam_gs", 2)
    rule(torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs as many parameters as before, 3, but got 4"):
        rule(torch.ones(2, 4))
    with pytest.raises(ValueError, match="jacobian must have shape"):
        rule(torch.ones(3))
