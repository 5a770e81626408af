import copy

import pytest
import torch
from torch import nn

import balance
from tests.networks import TASKS, named


class Replacing(nn.Module):
    """A module whose forward pass replaces a buffer by a new tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.register_buffer("expanded", torch.arange(2.0).expand(3, 2), persistent=False)

    def forward(self, x):
        self.mean = self.mean + x.detach().mean()
        return x - self.mean


class Network(nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Replacing(), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in TASKS)
        self.x = torch.randn(8, 5)
        self.to(device)

    def losses(self):
        z = self.trunk(self.x.to(self.heads[0].weight.device))
        return named([(head(z) - k).square().mean() for k, head in enumerate(self.heads)])


def copied(network):
    return {name: (buffer, buffer.clone()) for name, buffer in network.named_buffers()}


def assert_unchanged(network, before):
    after = dict(network.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer, name
        assert torch.equal(buffer, value), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_buffers_and_random_numbers_are_as_before(mode):
    network = Network()
    network.losses()
    buffers, state = copied(network), torch.get_rng_state()
    with balance.extra_forward(network), mode():
        network.losses()
        assert (network.trunk[1].running_mean != buffers["trunk.1.running_mean"][1]).any()
        assert not torch.equal(torch.get_rng_state(), state)
    assert_unchanged(network, buffers)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_restores_too():
    network = Network()
    buffers, state = copied(network), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), balance.extra_forward(network):
        network.losses()
        raise ZeroDivisionError
    assert_unchanged(network, buffers)
    assert torch.equal(torch.get_rng_state(), state)


def train(observe):
    """Three steps with famo; the model and the balancer."""
    network, balancer = Network(), balance.Balancer(TASKS, loss="famo")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        balancer.backward(network.losses())
        optimizer.step()
        observe(balancer, network)
    return dict(network.state_dict()), dict(balancer.state_dict())


@torch.no_grad()
def observe_on_a_copy(balancer, network):
    with torch.random.fork_rng():
        balancer.observe(copy.deepcopy(network).losses())


def observe(balancer, network):
    with balance.extra_forward(network), torch.no_grad():
        balancer.observe(network.losses())


def test_an_observation_is_an_observation_of_a_copy():
    torch.testing.assert_close(train(observe), train(observe_on_a_copy), rtol=0, atol=0, equal_nan=True)


def test_a_graph_from_before_can_still_be_walked():
    """Its backward pass uses tensors that batch normalisation has saved."""
    network, twin = Network(), Network()
    losses = []
    for net in (network, twin):
        torch.manual_seed(1)
        losses.append(sum(net.losses().values()))
    with balance.extra_forward(network), torch.no_grad():
        network.losses()
    for loss in losses:
        loss.backward()
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_numbers_of_the_device():
    network = Network("cuda")
    buffers, state = copied(network), torch.cuda.get_rng_state()
    with balance.extra_forward(network), torch.no_grad():
        network.losses()
        assert not torch.equal(torch.cuda.get_rng_state(), state)
    assert_unchanged(network, buffers)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_function_is_refused():
    with (
        pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but got method"),
        balance.extra_forward(Network().losses),
    ):
        pass


def test_a_balancer_inside_of_the_model_keeps_what_it_observes():
    """Its state is in buffers of the model, but an observation is not a forward pass."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"net": nn.Linear(3, 2), "balancer": balance.Balancer(("a", "b"), loss="famo")})
    losses = dict(zip("ab", model["net"](torch.randn(4, 3)).square().mean(0), strict=True))
    model["balancer"].backward(losses)
    before = model["balancer"].loss_balancer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with balance.extra_forward(model), torch.no_grad():
        model["balancer"].observe({task: (0.5 + k) * loss for k, (task, loss) in enumerate(losses.items())})
    after = model["balancer"].loss_balancer.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
