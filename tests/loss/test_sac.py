"""The agent of igbv2, compared with a soft actor-critic written in the plainest way."""

import copy

import pytest
import torch

from balance.loss import _sac
from balance.loss._sac import Agent
from tests.loss.defaults import default_dtype

K, LR = 2, 0.01


def filled(capacity=8, transitions=8, **options):
    agent = Agent(K, LR, capacity, seed=0, **options)
    random = torch.Generator().manual_seed(1)
    for _ in range(transitions):
        state, action, after = torch.rand(3, K, generator=random, dtype=torch.float64)
        agent.remember(state, action, float(torch.randn((), generator=random)), after)
    return agent


class Reference:
    """Copies of an agent's networks, and updates as in the paper: float32 networks, one Adam for each part."""

    def __init__(self, agent):
        self.generator = torch.Generator().set_state(agent.generator.get_state())
        self.actor, self.critics, self.slow = map(copy.deepcopy, (agent.actor, agent.critics, agent.slow_critics))
        for critic in self.critics:
            critic.requires_grad_()
        self.log_temperature = torch.tensor(0.2, dtype=torch.float64).log().requires_grad_()
        parts = (self.actor.parameters(), self.critics.parameters(), [self.log_temperature])
        self.adams = [torch.optim.Adam(part, lr=LR) for part in parts]

    def draw(self, states, *, official):
        mean, log_deviation = self.actor(states).chunk(2, dim=1)
        normal = torch.distributions.Normal(mean, log_deviation.clamp(-20, 2).exp())
        u = mean + normal.scale * torch.randn(mean.shape, generator=self.generator)
        density = normal.log_prob(u).sum(dim=1)
        if official:
            density = density - (1 - u.tanh() ** 2).log().sum(dim=1)
        return K * u.softmax(dim=1), density

    def values(self, critics, states, actions):
        return torch.cat([critic(torch.cat([states, actions], dim=1)) for critic in critics], dim=1)

    def update(self, batch, *, official):
        state, action, reward, after = batch[:, :K], batch[:, K : 2 * K], batch[:, 2 * K], batch[:, 2 * K + 1 :]
        temperature = float(self.log_temperature.detach().exp())
        with torch.no_grad():
            following, density = self.draw(after, official=official)
            soft = self.values(self.slow, after, following).min(dim=1).values - temperature * density
            target = reward + 0.99 * soft
        self.step(1, ((self.values(self.critics, state, action) - target[:, None]) ** 2).mean(dim=0).sum())
        proposed, density = self.draw(state, official=official)
        self.step(0, (temperature * density - self.values(self.critics, state, proposed).min(dim=1).values).mean())
        self.step(2, -(self.log_temperature * (density.detach().double() - K).mean()))
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.critics.parameters(), strict=True):
                slow.copy_(0.995 * slow + 0.005 * fast)

    def step(self, part, objective):
        for adam in self.adams:
            adam.zero_grad()
        objective.backward()
        self.adams[part].step()


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("transitions", [8, 3])
def test_training_is_a_textbook_update(transitions, official, monkeypatch):
    """Of the full number of updates and transitions with a full buffer, and of fewer with a buffer that is not full."""
    monkeypatch.setattr(_sac, "UPDATES", 4)
    agent = filled(transitions=transitions, official=official)
    reference = Reference(agent)
    share = (1 + transitions / 8) / 2
    for _ in range(int(4 * share)):
        chosen = torch.randint(transitions, (int(256 * share),), generator=reference.generator)
        reference.update(agent.buffer[chosen], official=official)
    agent.train()
    for ours, theirs in (
        (agent.actor, reference.actor),
        (agent.critics, reference.critics),
        (agent.slow_critics, reference.slow),
    ):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(agent.log_temperature, reference.log_temperature, rtol=1e-6, atol=1e-6)


def test_an_empty_buffer_trains_nothing():
    agent = filled(transitions=0)
    before = agent.state()
    agent.train()
    assert torch.equal(agent.state(), before)


def test_the_oldest_transition_is_overwritten():
    agent = Agent(1, LR, capacity=2, seed=0)
    for number in (1.0, 2.0, 3.0):
        agent.remember(torch.tensor([number]), torch.tensor([0.5]), -number, torch.tensor([10 * number]))
    assert agent.buffer.tolist() == [[3, 0.5, -3, 30], [2, 0.5, -2, 20]]
    assert agent.stored == 3


def test_actions_are_positive_and_sum_to_the_number_of_tasks():
    agent = filled()
    for action in (agent.explore(), agent.act(torch.ones(K, dtype=torch.float64))):
        assert action.dtype == torch.float64
        assert (action > 0).all()
        assert action.sum().item() == pytest.approx(K)


def test_random_actions_are_a_softmax_of_standard_normal_numbers():
    agent = filled()
    differences = torch.stack([agent.explore().log() for _ in range(2000)]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert differences.mean().item() == pytest.approx(0, abs=0.15)
    assert differences.var().item() == pytest.approx(2, abs=0.3)


def test_an_action_of_the_actor_is_drawn_with_its_mean_and_deviation():
    agent = filled()
    state = torch.tensor([0.3, 2.0], dtype=torch.float64)
    mean, log_deviation = agent.actor(state.float()).detach().double().chunk(2)
    differences = torch.stack([agent.act(state).log() for _ in range(2000)]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert differences.mean().item() == pytest.approx((mean[0] - mean[1]).item(), abs=0.15)
    assert differences.var().item() == pytest.approx(log_deviation.exp().square().sum().item(), rel=0.15)


def test_the_agent_is_float32_whatever_the_default():
    with default_dtype(torch.float64):
        agent = filled()
    assert {p.dtype for p in (*agent.actor.parameters(), *agent.critics.parameters())} == {torch.float32}
    assert agent.buffer.dtype == torch.float32
