import pytest
import torch

from balance import Balancer
from balance.testing import make_jacobian
from tests.gradient.directions import STATIONARY, build, direction


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_conflict_free_at_any_scale(name):
    """TorchJD returns the mean, which conflicts here, for gradients shorter than about 0.01."""
    J = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    unit = direction(name, J)
    assert (J @ unit >= -1e-12).all()
    for scale in (1e-150, 1e-15, 1e-3, 1e15, 1e150):
        torch.testing.assert_close(direction(name, scale * J), scale * unit, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_stationary_point(name):
    assert direction(name, STATIONARY).norm() <= 1e-12


def test_dualproj_is_the_mean_where_the_mean_conflicts_with_no_task():
    J = make_jacobian(6, "generic", 0).abs()
    torch.testing.assert_close(direction("dualproj", J), J.mean(dim=0))
    torch.testing.assert_close(direction("upgrad", J), J.mean(dim=0))


def test_two_tasks_of_pcgrad_are_twice_upgrad():
    for seed in range(10):
        J = make_jacobian(2, "generic", seed)
        torch.testing.assert_close(direction("pcgrad", J), 2 * direction("upgrad", J))


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_regularisation_is_relative_to_the_trace(name):
    J = torch.tensor([[1.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    G = J @ J.T
    weights = build(name, 2, reg_eps=1e-2)(G)
    torch.testing.assert_close(weights, build(name, 2)(G + 1e-2 * G.trace() * torch.eye(2, dtype=torch.float64)))
    torch.testing.assert_close(weights, build(name, 2, reg_eps=1e-2)(1e-6 * G))
    assert build(name, 2, reg_eps=1e-2)(torch.zeros(2, 2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "aligned_mtl", "config"])
def test_preferences_belong_to_tasks_also_when_tasks_are_absent(name):
    J = make_jacobian(3, "generic", 1)[:2]
    rule = build(name, 3, preference=[1.0, 5.0, 2.0])
    weights = rule(J @ J.T, present=torch.tensor([0, 2]))
    torch.testing.assert_close(weights, build(name, 2, preference=[1.0, 2.0])(J @ J.T))
    with pytest.raises(ValueError, match="must have one number for each task"):
        rule(J @ J.T)


def test_an_absent_task_leaves_the_smaller_problem_of_its_preferences():
    steps = []
    for tasks, preference in ((["a", "b", "c"], [1.0, 5.0, 2.0]), (["a", "c"], [1.0, 2.0])):
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        balancer = Balancer(tasks, gradient="upgrad", gradient_options={"preference": preference})
        balancer.backward({"a": parameter[0] ** 2, "c": parameter[1] - 3 * parameter[0]}, shared=[parameter])
        steps.append(parameter.grad)
    torch.testing.assert_close(*steps)


def test_equal_gradients_share_their_corrections():
    J = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
    for name in ("upgrad", "dualproj"):
        weights = build(name, 3)(J @ J.T)
        assert weights[0].item() == pytest.approx(weights[1].item(), rel=1e-12)
