import copy
import math

import pytest
import torch
from torch import nn

from balance import Splitter
from tests.splitter.views import (
    ROTATABLE,
    TASKS,
    Network,
    assert_same,
    assert_same_state,
    data,
    gradients,
    merged,
    modes,
    name_of,
    splitter_of,
)


class Learned(nn.Module):
    """A rule with a parameter, a float32 buffer and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device="cpu"))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3], device="cpu"))
        self.register_buffer("steps", torch.tensor(2, device="cpu"))

    def forward(self, gramian):
        return self.logits


CASTS = {
    "half": (lambda module: module.half(), torch.float16),
    "double and float": (lambda module: module.double().float(), torch.float32),
    "to": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "to_empty": (lambda module: module.to_empty(device="cpu"), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_casts_change_parameters_and_no_state(cast, dtype):
    splitter = Splitter(TASKS, gradient=Learned(), weights=(1, 2, 3))
    splitter.gradient_balancer.rule.logits.grad = torch.ones(3)
    before = {name: buffer.clone() for name, buffer in splitter.named_buffers()}
    cast(nn.ModuleList([splitter]))
    for name, buffer in splitter.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name
    assert splitter.gradient_balancer.rule.logits.dtype == splitter.gradient_balancer.rule.logits.grad.dtype == dtype
    assert splitter.gradient_balancer.rule.logits.tolist() == [1, 2, 3]
    assert splitter.gradient_balancer.rule.logits.grad.tolist() == [1, 1, 1]


@modes
def test_state_has_its_values_on_any_default_device(mode):
    with torch.device("meta"):
        network = nn.ModuleDict({"trunk": nn.Linear(2, 2), "splitter": splitter_of(TASKS, mode)})
    J = gradients(0, 3)
    torch.testing.assert_close(merged(network.to_empty(device="cpu")["splitter"], J), merged(splitter_of(TASKS, mode), J))


def test_state_moves_with_the_module():
    splitter = Splitter(TASKS).to("meta")
    assert {buffer.device.type for buffer in splitter.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in splitter.to_empty(device="cpu").buffers()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("mode", ROTATABLE, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_squares_of_half_precision_do_not_underflow(mode, dtype):
    J = (gradients(0, 3) * 1e-3).to(dtype)
    direction = merged(splitter_of(TASKS, mode), J)
    assert direction.dtype == dtype
    expected = merged(splitter_of(TASKS, mode), J.double())
    torch.testing.assert_close(direction.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("size", [1e-28, 1e28])
def test_squares_beyond_float32(size):
    J = gradients(0, 3).float()
    torch.testing.assert_close(merged(Splitter(TASKS), J * size), merged(Splitter(TASKS), J))


def test_features_of_different_dtypes():
    x, y = (
        torch.zeros(4, 2, dtype=torch.float16, requires_grad=True),
        torch.zeros(4, 3, dtype=torch.float64, requires_grad=True),
    )
    J = gradients(0, 2, 4, 5).half().double()
    views = Splitter(2, gradient="mgda")((x, y))
    sum((views[str(k)][0] * J[k, :, :2].half()).sum() + (views[str(k)][1] * J[k, :, 2:]).sum() for k in range(2)).backward()
    expected = merged(Splitter(2, gradient="mgda"), J)
    assert x.grad.dtype == torch.float16
    torch.testing.assert_close(y.grad, expected[:, 2:])
    torch.testing.assert_close(x.grad, expected[:, :2].half())


@pytest.mark.parametrize("mode", [{}, {"projection": 1}, {"gradient": "mgda"}], ids=name_of)
def test_autocast(mode):
    network = Network(splitter_of(TASKS, mode)).float()
    twin = copy.deepcopy(network)
    x = data().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = network.trunk(x)
        z.retain_grad()
        views = network.splitter(z)
        losses = {t: (h(views[t]).float() - i).square().mean() * 10**i for i, (t, h) in enumerate(network.heads.items())}
    assert z.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as some training loops have it
        sum(losses.values()).backward()
    assert z.grad.dtype == torch.bfloat16
    sum(twin.losses(x).values()).backward()
    for name, expected in twin.grads().items():
        found = network.grads()[name]
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 0.05 * expected.norm() + 1e-6, name


@modes
def test_autocast_around_backward_changes_nothing(mode):
    J = gradients(0, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merged(splitter_of(TASKS, mode), J)
    torch.testing.assert_close(found, merged(splitter_of(TASKS, mode), J), rtol=0, atol=0)


@modes
def test_grad_scaler(mode):
    """Scaled, balanced and unscaled, the step is the one without a scaler, also when the scale changes."""
    network, twin = (Network(splitter_of(TASKS, mode)).float() for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    network.splitter.scaler, twin.splitter.scaler = scaler, torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (network, twin)]
    for t in range(3):
        x = data(t).float()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(sum(network.losses(x).values())).backward()
        scaler.step(optimizers[0])
        scaler.update()
        sum(twin.losses(x).values()).backward()
        optimizers[1].step()
    assert scaler.get_scale() == 2.0**11
    assert_same(dict(network.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-6)


@modes
def test_a_scaler_can_be_assigned_at_any_time(mode):
    """Averages and Gramian are of unscaled gradients, and the trunk gets scaled gradients, also when the scale changes."""
    splitter, twin = splitter_of(TASKS, mode), splitter_of(TASKS, mode)
    for t, scale in enumerate([None, 2.0**10, 2.0**11, 2.0**4, None]):
        J = gradients(t, 3)
        if t == 1:
            splitter.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            splitter.scaler.scale(torch.ones(()))  # initialises the scale, which update() changes
        elif t == 4:
            splitter.scaler = None
        elif t > 1:
            splitter.scaler.update(scale)
        factor = scale or 1.0
        torch.testing.assert_close(merged(splitter, factor * J), factor * merged(twin, J), rtol=1e-9, atol=0)
        torch.testing.assert_close(splitter.squares, twin.squares, rtol=1e-12, atol=0)
        assert splitter.counts.tolist() == twin.counts.tolist()
        if twin.report.gramian is not None:
            torch.testing.assert_close(splitter.report.gramian, twin.report.gramian, rtol=1e-9, atol=1e-12)


def test_a_scaler_that_is_disabled_changes_nothing():
    splitter, J = Splitter(TASKS), gradients(0, 3)
    splitter.scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.testing.assert_close(merged(splitter, J), merged(Splitter(TASKS), J), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong", [65536.0, torch.ones(()), "cpu", torch.amp.GradScaler], ids=lambda value: type(value).__name__
)
def test_an_assigned_scaler_is_checked(wrong):
    splitter = Splitter(TASKS, scaler=torch.amp.GradScaler("cpu"))
    before = splitter.scaler
    with pytest.raises(TypeError, match="scaler must be a GradScaler, but got"):
        splitter.scaler = wrong
    assert splitter.scaler is before


def test_without_the_scaler_the_normalisation_undoes_the_scale():
    """Why ``scaler=`` is needed: the trunk would learn as if its gradients were divided by the scale."""
    J = gradients(0, 2)
    torch.testing.assert_close(merged(Splitter(2), J * 1024), merged(Splitter(2), J))


@pytest.mark.parametrize("value", [math.inf, math.nan])
@modes
def test_what_is_not_finite_leaves_no_trace_and_is_passed_on(mode, value):
    network = Network(splitter_of(TASKS, mode))
    network.step(data(0))
    state = copy.deepcopy(network.splitter.state_dict())
    network.zero_grad()
    losses = network.losses(data(1))
    (losses["a"] + losses["b"] * value + losses["c"]).backward()
    assert_same_state(network.splitter, state)
    assert all(p.grad.isnan().all() for p in network.trunk[2].parameters())
    assert network.heads["a"].weight.grad.isfinite().all()


def test_a_grad_scaler_skips_what_is_not_finite():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    network = Network(Splitter(TASKS, gradient="pcgrad", scaler=scaler))
    optimizer = torch.optim.SGD(network.trunk.parameters(), lr=0.1)
    before = copy.deepcopy(network.trunk.state_dict())
    scaler.scale(sum(network.losses(data()).values()) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same(dict(network.trunk.state_dict()), dict(before), rtol=0, atol=0)
