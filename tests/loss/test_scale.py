import pytest
import torch

from balance import Balancer, loss_balancers


def test_lower_bounds_shift_the_logarithm():
    rule = loss_balancers.build("scaleinvls", num_tasks=2, min_losses=[-1.0, -2.0])
    torch.testing.assert_close(rule(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 3.0]).log())
    torch.testing.assert_close(rule(torch.tensor([1.0]), present=torch.tensor([1])), torch.tensor([3.0]).log())


def test_a_task_that_is_fitted_perfectly_needs_a_bound():
    with pytest.raises(ValueError, match=r"Loss of task '1' is 0, .*zero=\"absent\".*min_losses"):
        loss_balancers.build("scaleinvls")(torch.tensor([1.0, 0.0]))
    assert loss_balancers.build("scaleinvls", min_losses=[0.0, -1e-6])(torch.tensor([1.0, 0.0])).isfinite().all()


@pytest.mark.parametrize("bounds", [[0.0], [0.0, 0.0, 0.0]])
def test_one_bound_for_each_task(bounds):
    theta = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="one number for each task"):
        Balancer(("a", "b"), loss="scaleinvls", loss_options={"min_losses": bounds}).backward({"a": theta, "b": theta})


def test_one_bound_for_each_task_also_where_tasks_are_absent():
    with pytest.raises(ValueError, match="one number for each task"):
        loss_balancers.build("scaleinvls", min_losses=[0.0, 0.0])(torch.ones(2), present=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="one number for each task"):
        loss_balancers.build("scaleinvls", min_losses=[0.0])(torch.ones(2), present=torch.tensor([0, 0]))


def test_gls_of_small_losses_does_not_underflow():
    losses = torch.tensor([1e-30, 2e-30], requires_grad=True)
    (weights,) = torch.autograd.grad(loss_balancers.build("gls")(losses).sum(), losses)
    torch.testing.assert_close(weights, torch.tensor([0.5 * 2**0.5, 0.25 * 2**0.5]))
