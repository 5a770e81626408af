"""Steps of loss balancers on an accelerator: nothing waits for the device, and errors are raised one call later.

An accelerator is needed nowhere but in the last test. Tensors on the device "meta" have no values, so that a copy to the host
or a decision on a value fails. Tensors on the host count as an accelerator's where `waits` is replaced; values are then
compared with steps that are checked at once.
"""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from balance import Balancer, compose, loss_balancers
from balance.rules import checks
from tests.stage.three_tasks import assert_same_state

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.bincount}
WAITING |= {aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.repeat_interleave, aten.allclose}
ON_THE_HOST = {"igbv2"}  # its agent lives on the host

STAGES = {name: {"loss": name} for name in loss_balancers.names() if name not in ON_THE_HOST} | {
    "bounded": {"loss": "scaleinvls", "loss_options": {"min_losses": [-1.0, -2.0, 0.0]}},
    "weighted": {"loss": "constant", "loss_options": {"weights": [1.0, 2.0, 3.0]}},
    "window": {"loss": "dwa", "loss_options": {"mode": "window", "window": 2}},
    "next batch": {"loss": "famo", "loss_options": {"next_batch": True, "min_losses": [-1.0, 0.0, 0.5]}},
    "three groups": {"loss": "go4align", "loss_options": {"num_groups": 3, "step_size": 0.1}},
    "base": {"loss": "igbv1", "loss_options": {"base_epoch": 0}},
    "nadir": {"loss": "stch", "loss_options": {"warmup_epochs": 0, "mu": 0.5}},
    "plain": {"loss": "stch", "loss_options": {"preference": [1.0, 2.0, 3.0], "reference": [0.1, 0.0, -1.0]}},
    "modified": {"loss": "tchebycheff", "loss_options": {"rho": 0.1, "form": "modified", "preference": [1.0, 2.0, 0.0]}},
    "far point": {"loss": "pbi", "loss_options": {"preference": [1.0, 0.0, 2.0], "reference": [0.1, 0.2, 0.3]}},
    "normalized": {"loss": "softadapt", "loss_options": {"variant": "normalized", "window": 3}},
    "by loss": {"loss": "softadapt", "loss_options": {"variant": "loss_weighted"}},
    "lookback": {"loss": "relobralo", "loss_options": {"rho": 0.5}},
    "gradient": {"loss": "minimax", "loss_options": {"ascent": "gradient", "every": 2}},
    "schedule": {"loss": "linear_schedule", "loss_options": {"end": [1.0, 2.0, 3.0], "steps": 2}},
    "chain": {"loss": ["famo", "uw"]},
    "chain of logarithms": {"loss": ["scaleinvls", "uw", "rlw"]},
    "priorities": {"loss": "go4align", "weights": [1.0, 2.0, 0.5]},
    "switch": {"loss": compose.switch({0: "uw", 1: "famo", 2: ("dwa", {"mode": "window"})})},
    "warmup": {"loss": compose.warmup("go4align", 1)},
}


class Waits(TorchDispatchMode):
    """Fails at an operation for which the host waits for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on_host = all(arg.device.type == "cpu" for arg in args if isinstance(arg, torch.Tensor))
        assert is_on_host or func.overloadpacket not in WAITING, func
        if func not in (aten._to_copy.default, aten.copy_.default):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            assert len({tensor.device for tensor in tensors}) < 2, f"{func} of tensors on two devices"
        if func is aten.index.Tensor and not is_on_host:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "indexing with a mask"
        if func is aten._to_copy.default and args[0].device.type == "cpu" and str(kwargs.get("device", "cpu")) != "cpu":
            assert kwargs.get("non_blocking"), "a copy from the host that waits"
        if func is aten.copy_.default and args[0].device != args[1].device:
            assert args[2:] == (True,), "a copy between devices that waits"
        return func(*args, **kwargs)


@pytest.fixture
def as_accelerator(monkeypatch):
    monkeypatch.setattr(checks, "waits", lambda _: True)


class Tasks:
    """A parameter and three losses of it, on a device."""

    def __init__(self, device="cpu"):
        self.theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float32).to(device).requires_grad_()
        self.target = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 2.0, 1.0], [0.0, 0.5, -1.0]]).to(device)

    def losses(self, factors=(1.0, 1.0, 1.0), tasks="012"):
        values = {str(k): f * (self.theta - self.target[k]).square().sum() for k, f in enumerate(factors)}
        return {task: values[task] for task in tasks}


def to_meta(stage):
    """Move the parameters of a stage, and only these."""
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"))


def epoch(stage, tasks, optimizer=None, names=("012", "02", "012", "12")):
    """Four steps, with absent tasks in two of them, and the end of an epoch; the reports."""
    reports = []
    for present in names:
        if optimizer is not None:
            optimizer.zero_grad()
        reports.append(stage.backward(tasks.losses(tasks=present)))
        if optimizer is not None:
            optimizer.step()
        with torch.no_grad():
            stage.observe(tasks.losses(tasks=present))
    stage.end_epoch()
    return reports


@pytest.mark.parametrize("kind", STAGES)
def test_no_step_copies_anything_to_the_host(kind, monkeypatch):
    monkeypatch.setattr(checks, "Arrival", lambda flag: None)  # the one copy that nobody waits for
    tasks = Tasks("meta")
    stage = Balancer(3, **STAGES[kind])
    to_meta(stage)
    optimizer = torch.optim.SGD([tasks.theta, *stage.parameters()], 0.01)
    with Waits():
        for _ in range(2):
            reports = epoch(stage, tasks, optimizer)
    assert all(report.loss_weights.is_meta for report in reports)
    assert tasks.theta.grad.is_meta


@pytest.mark.parametrize("kind", STAGES)
def test_values_are_those_of_checks_at_once(kind, as_accelerator):
    ways = {}
    for when in ("auto", "now"):
        tasks, stage = Tasks(), Balancer(3, checks=when, **STAGES[kind])
        optimizer = torch.optim.SGD([tasks.theta, *stage.parameters()], 0.01)
        reports = epoch(stage, tasks, optimizer) + epoch(stage, tasks, optimizer)
        stage.check()
        ways[when] = tasks.theta.detach(), reports, stage.state_dict()
    (theta, reports, state), (expected, others, other_state) = ways["auto"], ways["now"]
    assert torch.equal(theta, expected)
    for report, other in zip(reports, others, strict=True):
        assert torch.equal(report.loss_weights, other.loss_weights)
        assert torch.equal(report.weighted_losses, other.weighted_losses)
    assert_same_state(state, other_state)


BAD = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0, "negative": -1.0}


def after_one_epoch(kind, when):
    tasks, stage = Tasks(), Balancer(3, checks=when, **STAGES[kind])
    epoch(stage, tasks, names=("012",))
    stage.check()
    tasks.theta.grad = None
    own = [None if parameter.grad is None else parameter.grad.clone() for parameter in stage.parameters()]
    return tasks, stage, own, copy.deepcopy(stage.state_dict())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", STAGES)
def test_a_bad_step_is_an_error_one_call_later_and_moves_nothing(kind, bad, as_accelerator):
    factors, expected = (1.0, BAD[bad], 1.0), ""
    tasks, stage, _, _ = after_one_epoch(kind, "now")
    try:
        stage.backward(tasks.losses(factors))
    except ValueError as error:
        expected = str(error)
    assert expected or bad in ("zero", "negative")

    tasks, stage, own, state = after_one_epoch(kind, "auto")
    stage.backward(tasks.losses(factors))
    if not expected:
        stage.check()
        return
    assert bad in ("nan", "inf") or torch.equal(tasks.theta.grad, torch.zeros(3))  # 0 * NaN in the network stays NaN
    torch.testing.assert_close([parameter.grad for parameter in stage.parameters()], own, rtol=0, atol=0)
    with pytest.raises(ValueError, match=re.escape(expected)):
        stage.backward(tasks.losses())
    assert_same_state(stage.state_dict(), state)
    stage.backward(tasks.losses())  # the next step is an ordinary one
    stage.check()


def test_every_call_and_check_raise_the_error_once(as_accelerator):
    for call in (
        lambda stage, tasks: stage.observe(tasks.losses()),
        lambda stage, tasks: stage.observe_validation(tasks.losses()),
        lambda stage, tasks: stage.end_epoch(),
        lambda stage, tasks: stage.check(),
        lambda stage, tasks: stage.weights(tasks.losses()),
        lambda stage, tasks: stage.loss(tasks.losses()).backward(),
    ):
        tasks, stage = Tasks(), Balancer(3, loss="go4align")
        stage.backward(tasks.losses((1.0, -1.0, 1.0)))
        with pytest.raises(ValueError, match=r"Loss of task '1' is -.* must be above 0.* belongs to an earlier call"):
            call(stage, tasks)
        stage.check()
        call(stage, tasks)


def test_a_bad_step_adds_nothing_of_the_extra_loss_either(as_accelerator):
    tasks, stage = Tasks(), Balancer(3, loss="scaleinvls")
    stage.backward(tasks.losses((1.0, 0.0, 1.0)), extra=tasks.theta.sum())
    assert torch.equal(tasks.theta.grad, torch.zeros(3))


@pytest.mark.parametrize("loss", ["ls", "uw", "go4align"])
def test_no_graph_outlives_its_step(loss, as_accelerator):
    tasks, stage = Tasks(), Balancer(3, loss=loss)
    gc.disable()  # a cycle would keep the graph too
    try:
        losses, mark = tasks.losses(), Own()
        losses["0"].grad_fn.metadata["mark"], is_alive = mark, weakref.ref(mark)
        del mark
        stage.backward(losses)
        assert is_alive()
        del losses
        assert not is_alive()
    finally:
        gc.enable()


def test_observed_losses_and_means_of_epochs_are_checked_one_call_later_too(as_accelerator):
    tasks, stage = Tasks(), Balancer(3, loss="famo")
    stage.backward(tasks.losses())
    state = copy.deepcopy(stage.state_dict())
    with torch.no_grad():
        stage.observe(tasks.losses((1.0, 1.0, -1.0)))
    with pytest.raises(ValueError, match="Loss of task '2' is -"):
        stage.check()
    assert_same_state(stage.state_dict(), state)
    with torch.no_grad():
        stage.observe(tasks.losses())
        stage.observe(tasks.losses())
    with pytest.raises(RuntimeError, match="'famo' observes losses once after each backward"):
        stage.check()

    stage = Balancer(3, loss="stch", loss_options={"form": "log", "warmup_epochs": 0})
    stage.loss_sums.fill_(-1.0)
    stage.loss_counts.fill_(1)
    state = copy.deepcopy(stage.state_dict())
    stage.end_epoch()
    with pytest.raises(ValueError, match="Mean loss of task '0' is -1"):
        stage.check()
    assert_same_state(stage.state_dict(), state)


def test_a_checkpoint_of_a_bad_step_has_the_state_before_it(as_accelerator):
    """Also the counters and generators, which are on the host; the error is still raised later."""
    tasks, stage = Tasks(), Balancer(3, loss=["scaleinvls", "relobralo", "rlw", "linear_schedule"])
    stage.backward(tasks.losses())
    state = copy.deepcopy(stage.state_dict())
    stage.backward(tasks.losses((1.0, -1.0, 1.0)))
    assert_same_state(stage.state_dict(), state)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage)), stage):
        with pytest.raises(ValueError, match="Loss of task '1' is -"):
            other.backward(tasks.losses())
        assert_same_state(other.state_dict(), state)


def test_buffers_follow_the_losses_and_parameters_stay(monkeypatch):
    monkeypatch.setattr(checks, "Arrival", lambda flag: None)
    stage = Balancer(3, loss=["go4align", "uw"])
    to_meta(stage)
    parameters = list(stage.parameters())
    checkpoint = Balancer(3, loss=["go4align", "uw"]).state_dict()
    for _ in range(2):
        stage.backward(Tasks("meta").losses())
        assert all(a is b for a, b in zip(stage.parameters(), parameters, strict=True))
        assert stage.loss_balancer.rule.rules[0].rule.cumulative_losses.is_meta
        stage.load_state_dict(checkpoint, assign=True)
        to_meta(stage)
        parameters = list(stage.parameters())


class Own(torch.nn.Module):
    """An author's rule, with state that no stage can restore."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, losses):
        self.seen += losses.tolist()
        return 2 * losses


def test_rules_that_do_not_say_that_they_stay_on_the_device_are_checked_at_once(as_accelerator):
    rule, tasks = Own(), Tasks()
    for options in ({"loss": rule}, {"loss": compose.switch({0: "ls", 5: rule})}, {"loss": "igbv2"}, {"checks": "now"}):
        stage = Balancer(3, **options)
        with pytest.raises(ValueError, match="Losses must be finite"):
            stage.backward(tasks.losses((1.0, float("nan"), 1.0)))
        stage.check()
    assert rule.seen == []


@pytest.mark.parametrize("options", [{"nan": "absent"}, {"zero": "absent"}, {"gradient": "pcgrad"}])
def test_choices_that_need_values_are_checked_at_once(options, as_accelerator):
    stage, tasks = Balancer(3, **options), Tasks()
    with pytest.raises(ValueError, match="Losses must be finite"):
        stage.backward(tasks.losses((1.0, float("inf"), 1.0)), shared=[tasks.theta])


def test_a_scaler_skips_a_step_that_is_not_finite(as_accelerator):
    """A rule without state does not wait; the scaler sees NaN, and no error follows."""
    for loss in ("ls", "scaleinvls", "uw"):
        tasks, stage = Tasks(), Balancer(3, loss=loss)
        optimizer, scaler = torch.optim.SGD([tasks.theta], 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (float("inf"), 1.0):
            before = tasks.theta.detach().clone()
            optimizer.zero_grad()
            report = stage.backward(tasks.losses((1.0, factor, 1.0)), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            stage.check()
            assert torch.equal(tasks.theta, before) == (factor != 1.0)
        if loss != "uw":
            torch.testing.assert_close(report.loss_weights, torch.ones(3) if loss == "ls" else 1 / losses_at(before, tasks))


def losses_at(theta, tasks):
    return torch.stack([(theta - target).square().sum() for target in tasks.target])


def test_used_gradients_of_learned_scales_are_dropped_without_a_wait(as_accelerator):
    """A fused optimizer leaves no new version of the parameters, and this loop never sets their gradients to zero."""
    gradients = []
    for clears in (False, True):
        tasks, stage = Tasks(), Balancer(3, loss="uw")
        for _ in range(3):
            if clears:
                stage.zero_grad()
            stage.backward(tasks.losses())
            for parameter in stage.parameters():
                parameter.data.sub_(0.1 * parameter.grad)  # no new version
        gradients.append([parameter.grad for parameter in stage.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", STAGES)
def test_no_step_synchronises_with_a_gpu(kind):
    tasks, stage = Tasks("cuda"), Balancer(3, **STAGES[kind]).to("cuda")
    optimizer = torch.optim.SGD([tasks.theta, *stage.parameters()], 0.01)
    epoch(stage, tasks, optimizer)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch(stage, tasks, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stage.check()
    with pytest.raises(ValueError, match="Losses must be finite"):
        stage.backward(tasks.losses((1.0, float("nan"), 1.0)))
        stage.check()
