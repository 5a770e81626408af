import pytest
import torch

from balance import Balancer


def half_losses(theta):
    """Losses as a model in half precision gives them."""
    return (theta.half() * torch.tensor([1.0, 2.0], dtype=torch.float16)).unbind()


@pytest.mark.parametrize("scaler", [None, 4.0])
def test_a_loss_balancer_learns_from_losses_in_half_precision_where_gradients_are_finite(scaler):
    theta = torch.nn.Parameter(torch.ones(2))
    balancer = Balancer(("a", "b"), loss="go4align", loss_options={"num_groups": 1, "step_size": 0.0})
    scaler = None if scaler is None else torch.amp.GradScaler("cpu", init_scale=scaler)
    for step in (1, 2):
        report = balancer.backward(dict(zip("ab", half_losses(theta), strict=True)), scaler=scaler)
        assert balancer.loss_balancer.rule.cumulative_losses.tolist() == [step, 2 * step]
        weights = report.loss_weights.double()
        expected = step * (weights * torch.tensor([1.0, 2.0])) * (1 if scaler is None else 4)
        assert theta.grad.double().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert report.losses.tolist() == [1, 2]
