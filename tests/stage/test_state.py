import copy
import math

import pytest
import torch
from torch import nn

import balance
from balance import Balancer
from tests.stage.three_tasks import TASKS, Network, assert_same_state

# Epochs, state


def test_end_epoch_hands_over_mean_losses_of_the_steps_a_task_was_present():
    class Listener(nn.Module):
        def forward(self, losses):
            return losses

        def end_epoch(self, mean_losses):
            self.heard = mean_losses

    balancer = Balancer(TASKS, loss=Listener())
    theta = torch.ones((), requires_grad=True)
    for a, b in ((1.0, 4.0), (3.0, None)):
        balancer.backward({"a": a * theta} | ({} if b is None else {"b": b * theta}))
    balancer.end_epoch()
    torch.testing.assert_close(
        balancer.loss_balancer.rule.heard, torch.tensor([2.0, 4.0, math.nan], dtype=torch.float64), equal_nan=True
    )
    balancer.end_epoch()
    assert balancer.loss_balancer.rule.heard.isnan().all()


@pytest.mark.parametrize("gradient", [None, "mgda", "pcgrad"])
@pytest.mark.filterwarnings("ignore:mgda gives all weight")
@pytest.mark.parametrize("loss", [name for name in balance.loss_balancers.names() if name != "stl"])
def test_resuming_equals_not_stopping(loss, gradient, tmp_path):
    """Bit for bit, with the checkpoint taken in the middle of an epoch and written to disk."""

    def build():
        network = Network()
        balancer = Balancer(TASKS, loss=loss, gradient=gradient, seed=3)
        return network, balancer, torch.optim.Adam([*network.parameters(), *balancer.parameters()], lr=0.01)

    def train(network, balancer, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            balancer.backward(network.losses(), shared=network.shared())
            optimizer.step()
            if balancer.needs_observation:
                with torch.no_grad():
                    balancer.observe(network.losses())
            if balancer.needs_validation:
                balancer.observe_validation({task: 1.1 * loss.detach() for task, loss in network.losses().items()})
            if step % 3 == 2:
                balancer.end_epoch()

    straight = build()
    train(*straight, range(14))
    first = build()
    train(*first, range(7))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    resumed = build()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(7, 14))
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(resumed[1].state_dict(), straight[1].state_dict())


def test_checkpoint_of_other_tasks_is_refused():
    state = Balancer(("a", "b")).state_dict()
    with pytest.raises(ValueError, match="checkpoint is of tasks"):
        Balancer(("b", "a")).load_state_dict(state)


def test_seed_decides_the_draws_and_torch_global_state_is_left_alone():
    def weights(seed):
        balancer = Balancer(TASKS, loss="rlw", gradient="pcgrad", seed=seed)
        network = Network()
        before = torch.get_rng_state()
        report = balancer.backward(network.losses(), shared=network.shared())
        assert torch.equal(before, torch.get_rng_state())
        return report.loss_weights.tolist()

    assert weights(0) == weights(0) != weights(1)


# What others do around it


def test_a_used_up_generator_is_told():
    network = Network()
    shared = network.shared()
    balancer = Balancer(TASKS, gradient="mgda")
    balancer.backward(network.losses(), shared=shared)
    with pytest.raises(ValueError, match="generator that was used up"):
        balancer.backward(network.losses(), shared=shared)


def test_autocast_does_not_blunt_the_direction():
    theta = torch.randn(1000, requires_grad=True)
    data = torch.randn(2, 1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = {str(k): (theta * data[k]).sum() for k in range(2)}
        Balancer(2, gradient=lambda G: torch.ones(2)).backward(losses, shared=[theta])
    torch.testing.assert_close(theta.grad, data.sum(dim=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
@pytest.mark.parametrize("loss", ["famo", "go4align", "dwa"])
def test_a_parent_that_is_cast_leaves_the_state_of_rules_in_float64(loss, cast):
    parent = nn.Module()
    parent.balancer = Balancer(TASKS, loss=loss)
    cast(parent)
    assert {b.dtype for b in parent.balancer.loss_balancer.rule.buffers() if b.is_floating_point()} == {torch.float64}
    assert parent.balancer.double() is parent.balancer


def test_norm_scale_at_very_unequal_gradients():
    theta = torch.zeros(2, requires_grad=True)
    Balancer(2, gradient="mgda", scale="norm").backward({"0": theta[0] + 1, "1": 1e7 * theta[1] + 1}, shared=[theta])
    assert theta.grad.norm().item() == pytest.approx(1e7, rel=1e-6)


@pytest.mark.parametrize("gradient", [None, "pcgrad"])
def test_parameters_of_a_plain_callable_learn(gradient):
    s = torch.zeros(3, requires_grad=True)
    network = Network()
    losses = network.losses()
    Balancer(TASKS, loss=lambda L: (-s).exp() * L + s, gradient=gradient).backward(losses, shared=network.shared())
    torch.testing.assert_close(s.grad, 1 - torch.stack(list(losses.values())).detach())


def test_sparse_heads():
    table, shared = nn.Embedding(5, 3, sparse=True), torch.ones(3, requires_grad=True)
    for _ in range(2):
        z = table(torch.tensor([0, 2])) * shared
        Balancer(2, gradient="mgda").backward(torch.stack([z.sum(), z.square().sum()]), shared=[shared])
    assert table.weight.grad.is_sparse


def test_two_optimizers_skip_together():
    theta = torch.ones(2, requires_grad=True)
    balancer = Balancer(1, loss="uw", gradient="mgda")
    optimizers = [torch.optim.SGD([theta], lr=0.1), torch.optim.SGD(balancer.parameters(), lr=0.1)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    balancer.backward({"0": theta.sum() * math.inf}, shared=[theta], scaler=scaler)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert theta.tolist() == [1, 1]
    assert balancer.loss_balancer.rule.log_variances[0].item() == 0


def test_the_two_rules_draw_different_numbers():
    balancer = Balancer(3, loss="rlw", gradient="pcgrad", seed=5)
    assert not torch.equal(balancer.loss_balancer.rule.random.normal(4), balancer.gradient_balancer.rule.random.normal(4))


def test_draws_stay_on_the_host():
    with torch.device("meta"):
        assert Balancer(3, loss="rlw").loss_balancer.rule.random.normal(2).device.type == "cpu"


def test_a_directions_shape_and_values_are_checked(monkeypatch):
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))
    balance.gradient_balancers.register("short", sees="jacobian")(lambda J, *, losses: J[0, :-1] * losses[0])
    network = Network()
    with pytest.raises(ValueError, match="finite direction"):
        Balancer(TASKS, gradient="short").backward(network.losses(), shared=network.shared())


def test_report_is_detached_even_if_the_rule_learns():
    w = torch.ones(3, requires_grad=True)
    network = Network()
    report = Balancer(TASKS, gradient=lambda G: w.double() * 2).backward(network.losses(), shared=network.shared())
    assert not report.gradient_weights.requires_grad


def test_complex_parameters_are_refused():
    theta = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real"):
        Balancer(1, gradient="mgda").backward({"0": theta.abs().sum()}, shared=[theta])


@pytest.mark.parametrize("name", ["rlw", "famo", "go4align", "uw", "dwa"])
def test_copies_and_pickles(name):
    import pickle

    balancer = Balancer(TASKS, loss=name, gradient="pcgrad")
    network = Network()
    balancer.backward(network.losses(), shared=network.shared())
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert_same_state(twin.state_dict(), balancer.state_dict())
