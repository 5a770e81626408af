import pytest
import torch

from balance.stage.own_gradients import OwnGradients, restore


def parameter_with_gradients(number=21):
    """A parameter and some possible gradients, in the order of their addresses."""
    parameter = torch.nn.Parameter(torch.ones(1))
    return parameter, sorted((torch.zeros(1) for _ in range(number)), key=id)


def test_only_the_gradient_that_a_step_has_left_is_cleared():
    """Of many gradients, before and after it in memory."""
    parameter, gradients = parameter_with_gradients()
    left = gradients[10]
    for gradient in gradients:
        memory, parameter.grad = OwnGradients(), left
        memory.remember([parameter], skipped=False)
        with torch.no_grad():
            parameter.add_(1)  # the optimizer's step
        parameter.grad = gradient
        memory.clear_used([parameter])
        assert parameter.grad is (None if gradient is left else gradient)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_gradient_is_cleared_once_it_was_used_or_its_step_was_skipped(skipped):
    parameter, (gradient,) = parameter_with_gradients(1)
    memory, parameter.grad = OwnGradients(), gradient
    memory.clear_used([parameter])
    assert parameter.grad is gradient  # of nobody's step
    memory.remember([parameter], skipped=skipped)
    before = memory.clear_used([parameter])
    assert parameter.grad is (None if skipped else gradient)
    restore(before)
    assert parameter.grad is gradient


def test_a_change_of_values_that_is_no_new_version_counts_as_use():
    """As fused optimizers make it."""
    parameter, (gradient,) = parameter_with_gradients(1)
    memory, parameter.grad = OwnGradients(), gradient
    memory.remember([parameter], skipped=False)
    version = parameter._version
    parameter.data.add_(1)
    assert parameter._version == version
    memory.clear_used([parameter])
    assert parameter.grad is None
