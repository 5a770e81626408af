import copy
import pickle
from itertools import pairwise

import pytest
import torch

from balance import Balancer, loss_balancers
from tests.stage.three_tasks import TASKS, Network, assert_same_state


def train(balancer, network, optimizer, steps, per_epoch=3):
    for step in range(*steps):
        optimizer.zero_grad()
        balancer.backward(network.losses())
        optimizer.step()
        if step % per_epoch == per_epoch - 1:
            balancer.end_epoch()


def test_igbv2_resumes_bit_for_bit_while_it_trains_itself(tmp_path):
    """The checkpoint is taken after several trainings of the agent, with a ring buffer that has gone round."""

    def build():
        network = Network()
        balancer = Balancer(TASKS, loss="igbv2", loss_options={"buffer_size": 40}, seed=1)
        return balancer, network, torch.optim.Adam([*network.parameters(), *balancer.parameters()], lr=0.01)

    straight, first, resumed = build(), build(), build()
    train(*straight, (0, 160))
    train(*first, (0, 130))
    assert first[0].loss_balancer.rule.agent.stored > 80
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    train(*resumed, (130, 160))
    for p, q in zip(straight[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(resumed[0].state_dict(), straight[0].state_dict())


def test_igbv2_schedule():
    """Nothing is stored before the base exists. Training starts with the fourth epoch; the actor acts from the sixth."""
    balancer = Balancer(TASKS, loss="igbv2")
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    agent = balancer.loss_balancer.rule.agent
    initial = copy.deepcopy(agent.actor.state_dict())
    acts = []
    act = agent.act
    agent.act = lambda state: acts.append(1) or act(state)
    train(balancer, network, optimizer, (0, 50), per_epoch=25)
    assert agent.stored == 0
    train(balancer, network, optimizer, (50, 75), per_epoch=25)
    assert agent.stored == 25
    assert all(torch.equal(value, initial[key]) for key, value in agent.actor.state_dict().items())
    train(balancer, network, optimizer, (75, 101), per_epoch=25)
    assert not all(torch.equal(value, initial[key]) for key, value in agent.actor.state_dict().items())
    train(balancer, network, optimizer, (101, 125), per_epoch=25)
    assert not acts
    train(balancer, network, optimizer, (125, 130), per_epoch=25)
    assert len(acts) == 5


def test_igbv2_trains_from_the_first_step_of_the_fourth_epoch():
    rule = build_igbv2()
    run_igbv2(rule, (0, 150), per_epoch=50)
    initial = copy.deepcopy(rule.agent.actor.state_dict())
    assert all(torch.equal(value, initial[key]) for key, value in build_igbv2().agent.actor.state_dict().items())
    run_igbv2(rule, (150, 151), per_epoch=50)
    assert not all(torch.equal(value, initial[key]) for key, value in rule.agent.actor.state_dict().items())


@pytest.mark.slow
def test_the_agent_learns_what_pays():
    """If only weight on the first task lowers the losses, the actor learns to give it weight."""
    rule = loss_balancers.build("igbv2", num_tasks=2, base_epoch=0, sac_lr=3e-3, buffer_size=500)
    rule.end_epoch(torch.ones(2))
    for _ in range(4):
        rule.end_epoch(torch.ones(2))
    losses = torch.ones(2, dtype=torch.float64)
    shares = []
    for _ in range(600):
        leaf = losses.clone().requires_grad_()
        weights = torch.autograd.grad(rule(leaf).sum(), leaf)[0] * losses
        shares.append(weights[0].item())
        # the worse of the two tasks improves with the weight of the first, and drifts back
        losses = (1.0 - 0.4 * (weights[0] - 1)).expand(2).clone()
    assert sum(shares[-100:]) / 100 > sum(shares[:100]) / 100


def test_agent_parameters_are_hidden_from_the_optimizer():
    assert list(Balancer(TASKS, loss="igbv2").parameters()) == []
    assert loss_balancers.build("igbv2", num_tasks=3).agent.critics[0][0].in_features == 6
    agent = loss_balancers.build("igbv2", num_tasks=3).agent
    assert sum(p.numel() for p in agent.actor.parameters()) == 17_798
    assert sum(p.numel() for p in agent.critics.parameters()) == 35_074


def test_igbv2_needs_all_tasks():
    network = Network()
    with pytest.raises(ValueError, match="all tasks must be present"):
        Balancer(TASKS, loss="igbv2").backward({"a": network.losses()["a"]})


@pytest.mark.parametrize("official", [False, True])
def test_igbv2_trains_itself_on_both_densities(official):
    rule = loss_balancers.build("igbv2", num_tasks=2, base_epoch=0, official=official)
    for epoch in range(7):
        for step in range(20):
            weights = rule(torch.tensor([1.0 + step / 20, 2.0 - epoch / 7], dtype=torch.float64).requires_grad_())
            assert weights.isfinite().all()
        rule.end_epoch(torch.tensor([1.5, 1.5]))


def test_igbv1_waits_for_its_base_and_a_late_task_gets_its_own():
    rule = loss_balancers.build("igbv1", num_tasks=3, base_epoch=1)
    L = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    nan = torch.nan
    for means, known in (([1.0, 1.0, 1.0], 0), ([1.0, 4.0, nan], 2), ([9.0, 9.0, 6.0], 3)):
        rule.end_epoch(torch.tensor(means))
        assert rule.reference.base.isfinite().sum() == known
        losses = L.clone().requires_grad_()
        weights = torch.autograd.grad(rule(losses).sum(), losses)[0] * L
        assert weights.sum().item() == pytest.approx(3)
    assert rule.reference.base.tolist() == [1, 4, 6]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("igbv1", {"base_epoch": -1}, "not be negative"),
        ("igbv2", {"sac_lr": 0.0}, "must be positive"),
        ("igbv2", {"buffer_size": 0}, "at least 1"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ValueError, match=message):
        loss_balancers.build(name, num_tasks=2, **options)


@pytest.mark.parametrize("name", ["igbv1", "igbv2"])
def test_losses_must_be_positive(name):
    with pytest.raises(ValueError, match=rf"'1' is -2, but must be above 0, because '{name}' takes its logarithm\. Add"):
        loss_balancers.build(name, num_tasks=2)(torch.tensor([1.0, -2.0]))


def test_igbv1_weighs_all_alike_at_the_base():
    rule = loss_balancers.build("igbv1", num_tasks=3, base_epoch=0)
    L = torch.tensor([0.3, 1.0, 20.0], dtype=torch.float64)
    rule.end_epoch(L)
    torch.testing.assert_close(rule(L), L.log())


# --- the state of igbv2 -------------------------------------------------------------------------------------------------


def build_igbv2(seed=0, **options):
    return loss_balancers.build("igbv2", num_tasks=3, buffer_size=40, seed=seed, **options)


def run_igbv2(rule, steps, per_epoch=20):
    """Weighted losses at some steps of one fixed sequence: the agent trains at steps 100 and 150, and acts from step 100."""
    sequence = 0.5 + torch.rand(180, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weighted_losses = []
    for step in range(*steps):
        weighted_losses.append(rule(sequence[step]))
        if step % per_epoch == per_epoch - 1:
            rule.end_epoch(sequence[step])
    return torch.stack(weighted_losses)


def test_igbv2_draws_its_networks_from_its_own_generator_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    rule = build_igbv2(seed=7)
    initial = copy.deepcopy(rule.agent)
    run_igbv2(rule, (0, 180))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(7)
    for inputs, parameters in (
        (3, initial.actor[0]),
        (128, initial.actor[2]),
        (128, initial.actor[4]),
        (6, initial.critics[0][0]),
    ):
        for parameter in parameters.parameters():
            expected = torch.empty(parameter.shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            assert torch.equal(parameter, expected)


def test_igbv2_state_is_tensors_whose_shapes_never_change():
    """As code expects that saves to safetensors, averages checkpoints, or allocates the target of a load beforehand."""
    rule = build_igbv2()
    shapes = []
    for steps in pairwise((0, 1, 30, 101, 180)):
        run_igbv2(rule, steps)
        state = rule.state_dict()
        assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())
        shapes.append({key: (value.shape, value.dtype, value.device) for key, value in state.items()})
    assert all(shape == shapes[0] for shape in shapes)
    assert "_extra_state" in shapes[0]


def test_a_saved_state_of_igbv2_does_not_change_with_the_agent():
    rule = build_igbv2()
    run_igbv2(rule, (0, 98))
    saved = rule.get_extra_state()
    before = saved.clone()
    run_igbv2(rule, (98, 160))
    assert torch.equal(saved, before)
    assert not torch.equal(saved, rule.get_extra_state())


def test_restoring_an_igbv2_state_in_place_repeats_its_steps():
    """As the stage does after a failed step, also across a training."""
    rule = build_igbv2()
    run_igbv2(rule, (0, 98))
    saved = copy.deepcopy(rule.state_dict())
    first = run_igbv2(rule, (98, 160))
    rule.load_state_dict(saved)
    assert torch.equal(run_igbv2(rule, (98, 160)), first)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_igbv2_goes_on_alike_and_independently(duplicate):
    rule = build_igbv2()
    run_igbv2(rule, (0, 110))
    other = duplicate(rule)
    saved = other.get_extra_state()
    expected = run_igbv2(rule, (110, 180))
    assert torch.equal(other.get_extra_state(), saved)
    assert torch.equal(run_igbv2(other, (110, 180)), expected)
    assert_same_state(other.state_dict(), rule.state_dict())


def test_igbv2_refuses_the_state_of_another_agent():
    rule = build_igbv2()
    run_igbv2(rule, (0, 60))
    before = rule.get_extra_state()
    larger = loss_balancers.build("igbv2", num_tasks=3, buffer_size=41)
    with pytest.raises(ValueError, match=r"must have shape .* but got .* buffer_size as in the run"):
        rule.set_extra_state(larger.get_extra_state())
    with pytest.raises(ValueError, match=r"dtype uint8, but got .*float32"):
        rule.set_extra_state(before.float())
    assert torch.equal(rule.get_extra_state(), before)


@pytest.mark.parametrize("name", ["igbv1", "igbv2"])
def test_a_mean_loss_of_zero_is_refused_before_the_epoch_ends(name):
    rule = loss_balancers.build(name, num_tasks=2, base_epoch=0)
    before = copy.deepcopy(rule.state_dict())
    with pytest.raises(ValueError, match=f"Mean loss of task '1' is 0, but must be above 0, because '{name}' divides by it"):
        rule.end_epoch(torch.tensor([1.0, 0.0]))
    assert_same_state(rule.state_dict(), before)
