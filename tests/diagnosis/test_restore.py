import pytest
import torch
from torch import nn

import balance
from tests.diagnosis.problems import NONE, Quadratics, Untidy, batches_of_four


def state(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    gradients = [(name, p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    return [(name, t, t.detach().clone()) for name, t in tensors], gradients, flags, model.calls, torch.get_rng_state()


def assert_same(before, after):
    tensors, gradients, flags, calls, rng = before
    tensors_after, gradients_after, flags_after, calls_after, rng_after = after
    for (name, tensor, value), (_, tensor_after, value_after) in zip(tensors, tensors_after, strict=True):
        assert tensor is tensor_after, name
        assert torch.equal(value, value_after), name
    for (name, gradient, value), (_, gradient_after, value_after) in zip(gradients, gradients_after, strict=True):
        assert gradient is gradient_after, name
        assert value is value_after is None or torch.equal(value, value_after), name
    assert flags == flags_after
    assert calls == calls_after
    assert torch.equal(rng, rng_after)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_model_is_left_as_it_was(mode):
    model = Untidy()
    before = state(model)
    with mode():
        diagnosis = balance.diagnose(
            model.losses,
            batches_of_four(),
            model=model,
            shared=model.trunk.parameters(),
            lr=0.1,
            loss_methods=("famo", "rlw"),
            gradient_methods=("mgda", "graddrop"),
        )
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert_same(before, state(model))
    assert not torch.equal(diagnosis.start.losses, diagnosis.end.losses)
    assert diagnosis.parameters == 8 + 2 * 8 + 8 * 8 + 8 + 2 * 8  # but for the frozen weight


@pytest.mark.parametrize("call", [1, 3, 6, 10, 14])  # names, first look, training, second look, prices
def test_the_model_is_left_as_it_was_after_an_exception(call):
    model = Untidy()
    before = state(model)
    calls = []

    def losses(batch):
        calls.append(batch)
        if len(calls) == call:
            model.eval()
            raise KeyError("mine")
        return model.losses(batch)

    with pytest.raises(KeyError, match="mine"):
        balance.diagnose(losses, batches_of_four(), model=model, shared=model.trunk.parameters(), steps=4, **NONE)
    assert len(calls) == call
    assert_same(before, state(model))


def test_modes_and_flags_that_losses_change_are_put_back():
    model = Untidy()
    before = state(model)

    def losses(batch):
        model.train()
        model.trunk[0].weight.requires_grad_(True)
        return model.losses(batch)

    balance.diagnose(losses, batches_of_four(), model=model, shared=model.trunk.parameters(), steps=2, **NONE)
    assert_same(before, state(model))


def test_a_gradient_of_what_is_reached_in_training_only():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    model.extra = nn.Parameter(torch.ones(()).double())
    model.extra.grad = gradient = torch.tensor(7.0).double()
    calls = []

    def losses(batch):
        calls.append(batch)
        factor = model.extra if len(calls) == 5 else 1.0  # names, two batches, then training
        return {task: factor * loss for task, loss in model.losses(batch).items()}

    balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], steps=4, **NONE)
    assert model.extra.grad is gradient
    assert gradient == 7
    assert model.extra == 1


def test_gradients_outside_the_model_are_left_as_they_were():
    model = Quadratics(a=[1.0, 0], b=[0.0, 1])
    noise, offset = nn.Parameter(torch.ones(()).double()), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    noise.grad = gradient = torch.tensor(7.0).double()

    def losses(batch):
        return {task: noise * loss + (batch * offset).sum() + offset.sum() for task, loss in model.losses(1.0).items()}

    balance.diagnose(losses, [1.0, 2.0], model=model, shared=[model.theta], loss_methods=("uw",), gradient_methods=("mgda",))
    assert noise.grad is gradient
    assert gradient == 7
    assert offset.grad is None
    assert noise == 1


def test_same_state_same_numbers():
    model = Untidy()

    def look():
        torch.manual_seed(3)
        diagnosis = balance.diagnose(model.losses, batches_of_four(), model=model, shared=model.trunk.parameters(), **NONE)
        return diagnosis.as_dict()["start"], diagnosis.as_dict()["end"]

    assert look() == look()


def test_shared_tensor_outside_the_model_is_restored():
    model = nn.Linear(2, 2)
    outside = torch.ones(2, requires_grad=True)

    def losses(batch):
        y = model(batch * outside)
        return {"a": y[0].square(), "b": (y[1] - 1).square()}

    balance.diagnose(losses, [torch.ones(2), torch.zeros(2)], model=model, shared=[outside], lr=0.1, **NONE)
    assert outside.tolist() == [1, 1]
    assert outside.grad is None
