"""Networks, losses, buffers and steps of the problem ``metaworld``, on its tiny environment without a simulator."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

pytest.importorskip("gymnasium")

from experiments.problems import metaworld
from experiments.problems.metaworld.collection import RewardScale
from experiments.problems.metaworld.learning import Rows, critic_inputs, draw_rows, target_values
from experiments.problems.metaworld.networks import Actor, Critics, Inputs, ModelConfig, SoftActorCritic
from experiments.problems.metaworld.replay import Replay, Transitions
from experiments.training.step import build_optimizer, train_step
from tests.experiments.short_runs import prepare

TASKS = ("east", "north", "west")
SMALL = ModelConfig(source="points", width=8, layers=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def transitions(count):
    return Transitions(torch.randn(count, 4), torch.rand(count, 2), torch.rand(count), torch.randn(count, 4))


# Networks


@pytest.mark.parametrize("deviation", ["clamp", "tanh"])
def test_densities_are_those_of_a_squashed_gaussian(deviation):
    actor = Actor(4, 2, ModelConfig(width=8, layers=1, deviation=deviation)).double()
    actor.network[-1].bias.data[2:] = 30 if deviation == "clamp" else 0.8  # beyond the bound; about e^-1.7
    rows, noise = torch.randn(5, 4).double(), torch.randn(5, 2).double() / 10
    actions, log_density = actor.sample(rows, noise)
    mean, raw = actor.network(rows).chunk(2, dim=1)
    log_deviation = raw.clamp(-20, 2) if deviation == "clamp" else -9 + 11 * raw.tanh()
    expected = TransformedDistribution(Independent(Normal(mean, log_deviation.exp()), 1), TanhTransform(cache_size=1))
    before = mean + log_deviation.exp() * noise
    torch.testing.assert_close(actions, before.tanh())
    torch.testing.assert_close(log_density, expected.log_prob(expected.transforms[0](before)))
    torch.testing.assert_close(actor(rows)["action"], mean.tanh())


def test_the_density_of_an_action_at_the_edge_is_finite():
    actor = Actor(4, 2, SMALL)
    actor.network[-1].bias.data[:2] = 40
    actions, log_density = actor.sample(torch.zeros(1, 4))
    assert actions.tolist() == [[1, 1]]
    assert log_density.isfinite()


def test_separate_passes_give_the_joint_values_and_gradients():
    joint = Critics(9, SMALL)
    separate = copy.deepcopy(joint)
    separate.separate_passes = True
    inputs = Inputs(torch.randn(7, 9), (2, 0, 5))
    for ours, theirs in zip(joint(inputs), separate(inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    for critics in (joint, separate):
        critics(inputs)[2].square().sum().backward()
    for ours, theirs in zip(joint.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_methods_get_separate_passes_unless_told_otherwise(tiny):
    for words, separate in (
        ([], False),
        (["--gradient_method=pcgrad"], True),
        (["--gradient_method=pcgrad", "model.separate_passes=false"], False),
        (["model.separate_passes=true"], True),
    ):
        assert prepare(*tiny("metaworld", *words)).model.trunk.separate_passes is separate


def test_target_critics_follow_by_their_rate():
    network = SoftActorCritic(TASKS, ModelConfig(source="points", width=8, layers=1, target_rate=0.25))
    before = [parameter.clone() for parameter in network.targets.parameters()]
    for parameter in network.trunk.parameters():
        parameter.data += 1
    network.update_targets()
    for target, old in zip(network.targets.parameters(), before, strict=True):
        torch.testing.assert_close(target, old + 0.25)
        assert not target.requires_grad


def test_one_temperature_serves_all_tasks_where_it_is_asked_for():
    for per_task, count in ((True, 3), (False, 1)):
        network = SoftActorCritic(TASKS, ModelConfig(source="points", temperature=0.5, temperature_per_task=per_task))
        assert network.log_temperature.shape == (count,)
        torch.testing.assert_close(network.temperatures(torch.tensor([0, 2])), torch.tensor([0.5, 0.5]))


def test_the_identity_is_appended_unless_it_is_turned_off():
    rows, tasks = torch.zeros(2, 4), torch.tensor([2, 0])
    assert SoftActorCritic(TASKS, SMALL).with_identity(rows, tasks)[:, 4:].tolist() == [[0, 0, 1], [1, 0, 0]]
    blind = SoftActorCritic(TASKS, ModelConfig(source="points", task_identity=False))
    assert blind.with_identity(rows, tasks) is rows


# Losses


def test_the_loss_of_a_task_is_the_mean_of_both_squared_errors():
    inputs, targets = Inputs(torch.randn(5, 9), (2, 0, 3)), torch.randn(5)
    estimates = SoftActorCritic(TASKS, SMALL).trunk(inputs)
    losses = metaworld.losses(dict(zip(TASKS, estimates, strict=True)), (inputs, targets))
    assert list(losses) == ["east", "west"]  # no row of the batch is of the task north
    squares = (torch.cat(estimates, dim=1) - targets) ** 2
    torch.testing.assert_close(losses["east"], (squares[0, :2] + squares[1, :2]).mean())
    torch.testing.assert_close(losses["west"], (squares[0, 2:] + squares[1, 2:]).mean())


def test_target_values_are_rewards_and_soft_values_of_the_next_observations():
    network = SoftActorCritic(TASKS, SMALL)
    network.log_temperature.data = torch.tensor([0.1, 0.2, 0.3]).log()
    rows, steps = Rows(torch.tensor([0, 0, 2, 2, 2]), (2, 0, 3)), transitions(5)
    torch.manual_seed(1)
    actions, log_density = network.actor.sample(network.with_identity(steps.following, rows.tasks))
    inputs = critic_inputs(network, steps.following, actions, rows)
    first, second = network.targets.values(inputs)
    network.targets.pair[0][-1].bias.data += (second - first).median() - 1e-6  # so that each is the smaller one for some rows
    estimates = network.targets.values(inputs)
    assert len(estimates.argmin(0).unique()) == 2
    torch.manual_seed(1)
    values = target_values(network, steps, rows, 0.9)
    temperatures = torch.tensor([0.1, 0.1, 0.3, 0.3, 0.3])
    torch.testing.assert_close(values, steps.rewards + 0.9 * (estimates.min(0).values - temperatures * log_density))
    assert not values.requires_grad


def test_a_batch_has_equal_parts_or_random_ones():
    equal = draw_rows(3, 12, mixed=False)
    assert (equal.tasks.tolist(), equal.counts) == ([0] * 4 + [1] * 4 + [2] * 4, (4, 4, 4))
    assert draw_rows(3, 8, mixed=False).counts == (3, 3, 2)
    mixed = [draw_rows(3, 12, mixed=True) for _ in range(50)]
    assert all(rows.tasks.tolist() == sorted(rows.tasks.tolist()) and sum(rows.counts) == 12 for rows in mixed)
    assert all(rows.tasks.bincount(minlength=3).tolist() == list(rows.counts) for rows in mixed)
    assert len({rows.counts for rows in mixed}) > 10


# Buffers and rewards


def test_a_full_buffer_forgets_the_oldest_transitions():
    replay = Replay(2, 3, 4, 2)
    added = [transitions(2) for _ in range(5)]
    for step in added:
        replay.add(step)
    drawn = replay.draw(torch.tensor([1] * 60))
    assert len(replay) == 3
    assert set(drawn.rewards.tolist()) == {step.rewards[1].item() for step in added[2:]}
    for row in range(60):  # the parts of a transition stay together
        (step,) = [step for step in added if step.rewards[1] == drawn.rewards[row]]
        assert all(torch.equal(part[row], whole[1]) for part, whole in zip(drawn, step, strict=True))


def test_a_buffer_continues_from_its_state():
    replay, copied = Replay(2, 4, 4, 2), Replay(2, 4, 4, 2)
    for _ in range(3):
        replay.add(transitions(2))
    copied.load_state_dict(replay.state_dict())
    for _ in range(3):
        step = transitions(2)
        replay.add(step)
        copied.add(step)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(replay.stored, copied.stored, strict=True))


def test_rewards_are_divided_by_their_running_deviation():
    scale, mean, variance = RewardScale(2, 0.1), np.zeros(2), np.ones(2)
    for rewards in np.random.default_rng(0).normal(3, 2, (20, 2)):
        mean = 0.9 * mean + 0.1 * rewards
        variance = 0.9 * variance + 0.1 * (rewards - mean) ** 2
        np.testing.assert_allclose(scale(rewards), rewards / np.sqrt(variance), rtol=1e-6)
    assert RewardScale(2, 0.0)(rewards) is rewards


def test_rates_of_success_of_all_tasks():
    history = [{"a/success": a, "b/success": b} for a, b in ((0.0, 0.0), (1.0, 1.0), (1.0, 0.0))]
    summary = metaworld.summarize({"a/success": 0.5, "b/success": 0.25}, history)
    assert summary == {"all/success": 0.375, "all/best_success": 1.0, "all/last_success": 0.5, "all/area": 0.5}
    assert metaworld.score({"a/success": 0.5, "b/success": 0.25}) == -0.375
    assert summary.keys() <= metaworld.HIGHER_IS_BETTER


# Steps of training


def parameters_of(run):
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def changed(run, before):
    """The parts of the network that have changed."""
    moved = [name for name, old in before.items() if not torch.equal(dict(run.model.named_parameters())[name], old)]
    return {name.partition(".")[0] for name in moved}


def test_the_trainer_trains_the_critics_and_the_agent_everything_else(tiny):
    run = prepare(*tiny("metaworld", "--gradient_method=pcgrad", "train.max_norm=0.1"))
    optimizer = build_optimizer(run)
    batches = iter(run.batches)
    for _ in range(2):
        before = parameters_of(run)
        train_step(run, optimizer, next(batches))
        assert changed(run, before) == {"trunk"}
        before = parameters_of(run)
        run.agent.after_step()
        assert changed(run, before) == {"actor", "log_temperature", "targets"}
    assert all(parameter.requires_grad for parameter in run.model.trunk.parameters())
    assert all(parameter.grad is None for parameter in run.model.targets.parameters())


@pytest.mark.parametrize("separate", ["false", "true"])
def test_famo_observes_the_losses_of_the_same_batch_after_the_step(separate, tiny, monkeypatch):
    run = prepare(*tiny("metaworld", "--loss_method=famo", f"model.separate_passes={separate}"))
    batch = next(iter(run.batches))
    before = run.problem.losses(run.model(batch[0]), batch)
    seen = []
    observe = run.balancer.observe
    monkeypatch.setattr(run.balancer, "observe", lambda losses, **rest: (seen.append(losses), observe(losses, **rest)))
    report = train_step(run, build_optimizer(run), batch)
    after = run.problem.losses(run.model(batch[0]), batch)
    torch.testing.assert_close(report.losses, torch.stack(list(before.values())), check_dtype=False)
    (observed,) = seen
    assert observed.keys() == after.keys()
    for task, loss in after.items():
        torch.testing.assert_close(observed[task], loss)
        assert loss != before[task]


def test_a_step_of_the_actor_is_a_step_along_the_soft_value(tiny):
    """With one gradient step by hand, Adam's first step has the sign of the gradient."""
    run = prepare(*tiny("metaworld"))
    agent, network = run.agent, run.model
    next(iter(run.batches))
    observations, rows = agent.drawn
    before = copy.deepcopy(network)
    torch.manual_seed(5)
    agent.train_actor(observations, rows)
    torch.manual_seed(5)
    states = before.with_identity(observations, rows.tasks)
    actions, log_density = before.actor.sample(states, torch.randn(len(states), 2))
    values = before.values(critic_inputs(before, observations, actions, rows)).min(0).values
    temperatures = before.log_temperature.exp().detach()[rows.tasks]
    loss = (temperatures * log_density - values).mean()
    gradients = torch.autograd.grad(loss, list(before.actor.parameters()))
    for old, new, gradient in zip(before.actor.parameters(), network.actor.parameters(), gradients, strict=True):
        clear = gradient.abs() > 1e-5
        assert torch.equal((new - old)[clear].sign(), -gradient[clear].sign())
    entropy_exceeds = torch.stack([part.mean() for part in (-log_density).split(rows.counts)]) > agent.target_entropy
    assert torch.equal(network.log_temperature < before.log_temperature, entropy_exceeds)


def test_actor_and_temperature_can_have_balancers(tiny):
    words = ["--loss_method=rlw", "--gradient_method=pcgrad", "agent.balanced=[actor,temperature]", "balancer.metric=optimizer"]
    run = prepare(*tiny("metaworld", *words))
    plain = prepare(*tiny("metaworld", *words[:2]))
    assert plain.agent.actor.balancer is None
    optimizer = build_optimizer(run)
    for batch in run.batches:
        train_step(run, optimizer, batch)
        run.agent.after_step()
    for learner in (run.agent.actor, run.agent.temperature):
        assert learner.balancer.report.tasks == run.problem.TASKS
        assert learner.balancer.metric.optimizer is learner.optimizer
    assert run.agent.actor.balancer.report.cosines is not None


def test_balancers_of_the_actor_learn_the_end_of_an_epoch(tiny):
    run = prepare(*tiny("metaworld", "--loss_method=dwa", "agent.balanced=[temperature]"))
    for epochs in (1, 2):
        for _ in run.batches:
            run.agent.after_step()
        history = run.agent.temperature.balancer.state_dict()["loss_balancer.rule.history"]
        assert (~history.isnan()).any(dim=1).sum() == epochs
    run.agent.resume(run.agent.state_dict(), len(run.agent))
    assert list(run.batches) == []  # the epoch had ended before
    assert torch.equal(run.agent.temperature.balancer.state_dict()["loss_balancer.rule.history"], history)


def test_parameters_of_a_balancer_of_the_actor_are_trained(tiny):
    run = prepare(*tiny("metaworld", "--loss_method=uw", "agent.balanced=[actor]", "train.balancer_lr=0.5"))
    before = [parameter.item() for parameter in run.agent.actor.balancer.parameters()]
    next(iter(run.batches))
    run.agent.after_step()
    after = [parameter.item() for parameter in run.agent.actor.balancer.parameters()]
    assert [abs(new - old) for new, old in zip(after, before, strict=True)] == pytest.approx([0.5, 0.5], rel=1e-3)


# Collection


def test_a_transition_is_stored_after_the_step(tiny):
    """So a batch never contains the transition of the same step, as in the published code."""
    run = prepare(*tiny("metaworld", "agent.random_steps=4"))
    next(iter(run.batches))
    assert len(run.agent.replay) == 4
    run.agent.after_step()
    assert len(run.agent.replay) == 5


def test_no_environment_moves_in_the_first_updates(tiny):
    run = prepare(*tiny("metaworld", "agent.first_updates=2", "agent.random_steps=4", "agent.epoch_steps=4"))
    sizes = []
    for _ in run.batches:
        run.agent.after_step()
        sizes.append(len(run.agent.replay))
    assert sizes == [4, 4, 5, 6]


def test_episodes_are_cut_and_their_goals_drawn(tiny):
    run = prepare(*tiny("metaworld", "data.goals=5", "agent.random_steps=23", "data.episode_steps=5"))
    goals = []
    begin = run.data.train.world.simulation.begin
    run.data.train.world.simulation.begin = lambda chosen: (goals.append(list(chosen)), begin(chosen))[1]
    run.agent.explore()
    assert len(goals) == 5
    assert len({goal for episode in goals for goal in episode}) > 2
    assert goals == [run.data.train.world.goals_of(episode) for episode in range(5)]
    stored = run.agent.replay.stored
    for step in range(22):  # an observation follows the one before, except where an episode begins
        continues = torch.equal(stored.observations[:, step + 1], stored.following[:, step])
        assert continues == ((step + 1) % 5 != 0)


def test_an_evaluation_leaves_the_episode_of_the_training_as_it_was(tiny):
    run = prepare(*tiny("metaworld", "agent.random_steps=8", "data.episode_steps=5", "data.goals=3", "data.evaluation_goals=2"))
    run.agent.explore()
    before = run.agent.state_dict()
    rates = list(run.agent.evaluate(run.data.validation))
    assert len(rates) == 2
    assert rates[0].keys() == {f"{task}/success" for task in run.problem.TASKS}
    after = run.agent.state_dict()
    assert torch.equal(before["collection"]["actions"], after["collection"]["actions"])
    assert before["collection"]["goals"] == after["collection"]["goals"]
    assert torch.equal(torch.from_numpy(run.agent.collection.observations), before["collection"]["observations"])
    random = before["collection"]["observations"]
    run.data.train.world.simulation.finish = lambda: pytest.fail("no step is left to finish")
    assert random.shape == (len(run.problem.TASKS), 4)


def test_environments_that_take_another_course_are_an_error(tiny):
    run = prepare(*tiny("metaworld", "agent.random_steps=8", "data.episode_steps=5"))
    run.agent.explore()
    run.agent.collection.observations = run.agent.collection.observations + 1e-3
    with pytest.raises(RuntimeError, match="must lead to the same observations, but the environments took another course"):
        list(run.agent.evaluate(run.data.validation))


def test_success_is_success_at_any_step(tiny):
    run = prepare(*tiny("metaworld", "data.episode_steps=12"))
    simulation = run.data.train.world.simulation
    first = simulation.begin([0, 0])

    def to_the_goal_and_on(observations):
        towards = np.clip((observations[:, 2:] - observations[:, :2]) / 0.1, -1, 1)
        return towards if len(simulation.actions) < 9 else -np.ones((2, 2), np.float32)

    successes = run.agent.collection.try_goal(0, to_the_goal_and_on)
    assert math.dist(first[0, :2], first[0, 2:]) < 0.9
    assert successes.tolist() == [1, 1]
    assert simulation.step(np.zeros((2, 2), np.float32)).successes.tolist() == [0, 0]
