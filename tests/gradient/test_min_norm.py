import torch
from hypothesis import given

from balance import gradient_balancers
from tests.strategies import jacobians


@given(jacobians())
def test_mgda_direction_gains_at_least_its_squared_length_on_every_task(J):
    d = gradient_balancers.build("mgda")(J @ J.T) @ J
    assert (J @ d >= d @ d - 1e-9 * J.norm() ** 2).all()
    assert d.norm() <= J.norm(dim=1).min() * (1 + 1e-9) + 1e-9 * J.norm()


def test_mgda_two_tasks_closed_form():
    for angle in torch.linspace(0.1, 3.1, 13, dtype=torch.float64):
        J = torch.stack([torch.tensor([2.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])])
        G = J @ J.T
        first = ((G[1, 1] - G[0, 1]) / (G[0, 0] + G[1, 1] - 2 * G[0, 1])).clamp(0, 1)
        weights = gradient_balancers.build("mgda")(G)
        torch.testing.assert_close(weights, torch.stack([first, 1 - first]), rtol=1e-9, atol=1e-12)


def test_mgda_gives_all_weight_to_a_zero_gradient():
    assert gradient_balancers.build("mgda")(torch.diag(torch.tensor([0.0, 1.0]))).tolist() == [1, 0]
