import pytest
import torch

from balance import Balancer
from experiments.problems.regression100 import TASKS, DataConfig, build_model, load, losses, metrics, targets


@pytest.fixture(scope="module")
def batch():
    return load(DataConfig()).train[list(range(1000))]


def train(balancer, batch, steps):
    """Losses before each step (steps, 100), and the layer."""
    torch.manual_seed(0)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        seen.append(balancer.backward(losses(model(batch[0]), batch), shared=model.trunk.parameters()).losses)
        optimizer.step()
        if balancer.needs_observation:
            with torch.no_grad():
                balancer.observe(losses(model(batch[0]), batch))
    return torch.stack(seen), model


def test_data_are_standard_normal_and_seeded(batch):
    x, y = batch
    assert x.shape == (1000, 20)
    assert y.shape == (1000, 100)
    for numbers in (x, y):
        assert abs(numbers.mean()) < 0.03
        assert numbers.std().item() == pytest.approx(1, abs=0.02)
    again, other = (load(DataConfig(seed=seed)).test[[5]][1] for seed in (0, 1))
    assert torch.equal(again[0], y[5])
    assert not torch.equal(other[0], y[5])


def test_one_linear_layer_of_which_each_task_has_a_row(batch):
    model = build_model()
    assert sum(p.numel() for p in model.trunk.parameters()) == 2100
    assert list(model.heads.parameters()) == []
    task_losses = losses(model(batch[0]), batch)
    assert tuple(task_losses) == TASKS
    assert len(TASKS) == 100
    by_hand = (batch[0] @ model.trunk.weight[7] + model.trunk.bias[7] - batch[1][:, 7]).square().mean()
    torch.testing.assert_close(task_losses["y07"], by_hand)
    (gradient,) = torch.autograd.grad(task_losses["y07"], [model.trunk.weight])
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [7]


def test_famo_keeps_a_hundred_weights_near_equal_while_the_losses_fall(batch):
    balancer = Balancer(TASKS, loss="famo", loss_options={"gamma": 0.01, "lr": 0.025})
    seen, _ = train(balancer, batch, 100)
    mean = seen.mean(dim=1)
    assert (mean.diff() < 0).all()
    assert mean[-1] < 0.9 * mean[0]
    weights = balancer.loss_balancer.rule.logits.softmax(dim=0)
    assert (weights - 0.01).abs().max() < 0.005
    assert weights.std() > 1e-6  # but they did move


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "cagrad", "imtl", "nashmtl", "graddrop"])
def test_gradient_balancers_manage_a_hundred_tasks(batch, method):
    """The tasks share no entry of the weight, so nothing conflicts and every loss falls, or stays where it has no weight."""
    seen, model = train(Balancer(TASKS, gradient=method), batch, 3)
    after = torch.stack(list(losses(model(batch[0]), batch).values()))
    assert (after <= seen[0] + 1e-6).all()
    assert after.mean() < seen[0].mean()


def test_metrics(batch):
    answers = targets(batch)
    errors = {name: metric(answers[name[:3]] + 0.5, answers[name[:3]]).item() for name, metric in metrics().items()}
    assert errors == pytest.approx({f"{task}/mse": 0.25 for task in TASKS}, rel=1e-4)
