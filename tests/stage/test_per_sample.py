"""Stages with one loss per sample: ``tasks=None``."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from balance import Balancer, compose
from balance.distributed.ranks import Ranks
from balance.engine import engine


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses_of(model, count=6):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return functional.cross_entropy(model(x), torch.randint(3, (count,), generator=generator), reduction="none")


def gradients_by_sample(model, count=6):
    """Return the Jacobian by one pass for each sample. Shape (count, P)."""
    losses = losses_of(model, count)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("gradient", ["mgda", "pcgrad", "graddrop", lambda G: torch.arange(1.0, len(G) + 1).to(G)])
def test_every_batch_may_have_another_size(gradient):
    stage = Balancer(None, gradient=gradient)
    for count in (6, 1, 3, 6):
        model = network()
        report = stage.backward(losses_of(model, count), shared=model.parameters())
        J = gradients_by_sample(model, count)
        assert report.tasks == tuple(map(str, range(count)))
        torch.testing.assert_close(report.gramian, J @ J.T)
        if report.total_weights is not None:
            torch.testing.assert_close(flat_grad(model), report.total_weights @ J)
    assert stage.report is report
    assert report.as_metrics().keys() >= {"loss/0", "cosine/4__5"}


@pytest.mark.parametrize("loss", ["ls", "scaleinvls", "rlw", ["rlw", "scaleinvls"], lambda losses: losses.square()])
@pytest.mark.parametrize("gradient", [None, "mgda"])
def test_loss_balancers_without_state(loss, gradient):
    model, stage = network(), Balancer(None, loss=loss, gradient=gradient)
    for count in (6, 2):
        model.zero_grad()
        report = stage.backward(losses_of(model, count), shared=model.parameters())
        torch.testing.assert_close(flat_grad(model), report.total_weights @ gradients_by_sample(model, count))


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        ("dwa", None),
        ("famo", "mgda"),
        ("uw", "mgda"),
        ("stl", None),
        (["scaleinvls", "igbv1"], None),
        ("ls", compose.every(2, "mgda", 3)),
        ("ls", compose.smoothed("mgda", 0.5, 3)),
        ("ls", compose.grouped("mgda", [[0, 1], [2]], 3)),
    ],
)
def test_rules_with_state_by_task_are_refused(loss, gradient):
    with pytest.raises(ValueError, match=r"every sample is a task.* keeps state by task"):
        Balancer(None, loss=loss, gradient=gradient)


class Counting(nn.Module):
    """A rule of a user: a number of steps is no state by task, a number for each task is."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("steps", torch.zeros(size))

    def forward(self, losses):
        self.steps += 1
        return losses * 2


class Observing:
    def __call__(self, losses):
        return losses

    def observe(self, losses):
        pass


def test_rules_of_users():
    model, stage = network(), Balancer(None, loss=Counting(()), gradient="mgda")
    stage.backward(losses_of(model), shared=model.parameters())
    assert stage.loss_balancer.rule.steps == 1
    with pytest.raises(ValueError, match="loss balancer Counting keeps state by task"):
        Balancer(None, loss=Counting(3))
    with pytest.raises(ValueError, match="learns from the losses of lasting tasks"):
        Balancer(None, loss=Observing())


def test_choices_that_need_lasting_tasks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match='nan="absent" needs losses by name'):
        Balancer(None, nan="absent")
    stage, model = Balancer(None, gradient="mgda"), network()
    with pytest.raises(ValueError, match=r"collect\(\) adds up the losses of lasting tasks"):
        stage.collect()
    with pytest.raises(ValueError, match=r"estimate\(\) needs the number of tasks"):
        stage.estimate(model.parameters())
    with pytest.raises(ValueError, match="Leave counts out"):
        stage.backward(losses_of(model), shared=model.parameters(), counts=[1] * 6)
    monkeypatch.setattr(Ranks, "size", 2)
    with pytest.raises(RuntimeError, match="each of the 2 processes"):
        stage.backward(losses_of(model), shared=model.parameters())
    with pytest.raises(RuntimeError, match="each of the 2 processes"):
        Balancer(None, gradient="mgda")


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda v: {"a": v[0]}, TypeError, "got dict. Use reduction='none'"),
        (list, TypeError, "got list"),
        (lambda v: v.mean(), ValueError, r"shape \(B,\) with B >= 1, but got \(\)"),
        (lambda v: v[:0], ValueError, r"got \(0,\)"),
        (lambda v: v[None], ValueError, r"got \(1, 6\)"),
        (lambda v: v.long(), TypeError, "got torch.int64"),
        (lambda v: v / 0, ValueError, "Losses must be finite, but got {'0': inf"),
        (lambda v: v.detach(), ValueError, "No loss requires a gradient"),
    ],
)
def test_losses_of_another_form_are_errors(losses, error, message):
    model, stage = network(), Balancer(None, gradient="mgda")
    with pytest.raises(error, match=message):
        stage.backward(losses(losses_of(model)), shared=model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_parameters_that_no_sample_reaches():
    model, other, stage = network(), nn.Linear(2, 2), Balancer(None, gradient="mgda")
    with pytest.raises(ValueError, match="none reaches any of the 2 tensors in shared"):
        stage.backward(losses_of(model), shared=other.parameters())
    stage.backward(losses_of(model), shared=[*model.parameters(), *other.parameters()])
    assert other.weight.grad is None
    model.requires_grad_(requires_grad=False)[2].requires_grad_()
    stage.backward(losses_of(model), shared=model[0].parameters())  # only a head is left


def test_state_and_epochs():
    stage = Balancer(None, gradient="pcgrad", seed=3)
    model = network()
    stage.backward(losses_of(model), shared=model.parameters())
    stage.observe(losses_of(model))
    stage.end_epoch()
    assert stage.loss_sums.shape == stage.loss_counts.shape == (0,)
    assert "Balancer(None" in repr(stage)
    twins = [copy.deepcopy(stage), pickle.loads(pickle.dumps(stage)), Balancer(None, gradient="pcgrad", seed=9)]
    twins[2].load_state_dict(stage.state_dict())
    reports = []
    for twin in [stage, *twins]:
        model = network()
        reports.append(twin.backward(losses_of(model, 5), shared=model.parameters()))
    for report in reports[1:]:
        assert torch.equal(report.total_weights, reports[0].total_weights)
    with pytest.raises(ValueError, match=r"The checkpoint is of tasks \(\), but this Balancer is for \('a',\)"):
        Balancer(["a"], gradient="pcgrad").load_state_dict(Balancer(None, gradient="pcgrad").state_dict(), strict=False)


def test_zero_losses_can_be_absent():
    model, stage = network(), Balancer(None, loss="scaleinvls", gradient="mgda", zero="absent")
    keep = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64)
    report = stage.backward(losses_of(model) * keep, shared=model.parameters())
    assert report.tasks == ("0", "2", "3", "5")
    J = gradients_by_sample(model)[keep.bool()]
    torch.testing.assert_close(flat_grad(model), report.total_weights @ J)
    plain = network()
    Balancer(None, loss="scaleinvls", zero="absent").backward(losses_of(plain) * keep)
    assert all(p.grad is not None for p in plain.parameters())
    with pytest.raises(ValueError, match="All losses are NaN or zero"):
        stage.backward(losses_of(model) * 0, shared=model.parameters())


def test_further_ways_to_take_a_step():
    model, stage = network(), Balancer(None, gradient="mgda")
    report = stage.backward(losses_of(model), shared=model.parameters())
    expected = flat_grad(model)

    losses = losses_of(model)
    trial = stage.weights(losses, shared=model.parameters())
    assert torch.equal(trial.total_weights, report.total_weights)
    model.zero_grad()
    stage.backward(losses, shared=model.parameters())  # the trial has kept the graph
    torch.testing.assert_close(flat_grad(model), expected)

    model.zero_grad()
    value = stage.loss(losses_of(model), shared=model.parameters())
    torch.testing.assert_close(value, losses_of(model).sum().detach())
    (2 * value).backward()
    torch.testing.assert_close(flat_grad(model), 2 * expected)

    model.zero_grad()
    penalty = sum(p.square().sum() for p in model.parameters())
    stage.backward(losses_of(model), shared=model.parameters(), extra=penalty, factor=0.5)
    torch.testing.assert_close(flat_grad(model), 0.5 * expected + torch.cat([p.detach().flatten() for p in model.parameters()]))

    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    report = stage.backward(losses_of(model), shared=model.parameters(), scaler=scaler)
    torch.testing.assert_close(flat_grad(model), 8 * expected)
    torch.testing.assert_close(report.gramian, trial.gramian)


def test_a_gradient_that_is_not_finite_names_its_sample():
    model, stage = network(), Balancer(None, gradient="mgda")
    x = torch.randn(4, 4, dtype=torch.float64)
    roots = torch.tensor([1.0, 1, 0, 1], dtype=torch.float64)
    losses = (model(x).square() * roots[:, None]).sum(1).sqrt()
    with pytest.raises(ValueError, match="the gradients of 2 are not"):
        stage.backward(losses, shared=model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_graph_is_freed():
    model, stage = network(), Balancer(None, gradient="mgda")
    losses = losses_of(model)
    stage.backward(losses, shared=model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = network().to(dtype)
    x, y = torch.randn(6, 4, dtype=dtype), torch.arange(6) % 3
    for gradient in (None, "mgda"):
        model.zero_grad()
        losses = functional.cross_entropy(model(x), y, reduction="none")
        Balancer(None, gradient=gradient).backward(losses, shared=model.parameters())
        assert flat_grad(model).isfinite().all()
        if gradient is None:
            expected = torch.autograd.grad(functional.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))
            torch.testing.assert_close(flat_grad(model), torch.cat([g.flatten() for g in expected]), atol=2e-2, rtol=2e-2)


class Split(nn.Module):
    """A trunk, features and a head."""

    def __init__(self, *, checkpointed=False, mixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 8), nn.Tanh()).double()
        self.head = nn.Linear(8, 3).double()
        self.checkpointed, self.mixed = checkpointed, mixed

    def run(self, count=6):
        x = torch.linspace(-1, 1, 4 * count, dtype=torch.float64).view(count, 4).sin().requires_grad_(self.checkpointed)
        z = checkpoint(self.trunk, x, use_reentrant=True) if self.checkpointed else self.trunk(x)
        output = self.head(z)
        output = output - output.mean(0) if self.mixed else output
        return z, functional.cross_entropy(output, torch.arange(count) % 3, reduction="none")


@pytest.mark.parametrize("heads", ["weighted", "unweighted"])
@pytest.mark.parametrize("scale", ["paper", "norm"])
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "mixed"])
def test_features(heads, scale, kind, monkeypatch):
    taken, measure = [], engine.measure_samples

    def recorded(*arguments, **options):
        taken.append(measure(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(engine, "measure_samples", recorded)
    results = []
    for is_single in (True, False):
        model = Split(checkpointed=kind == "checkpointed", mixed=kind == "mixed")
        z, losses = model.run()
        stage = Balancer(None if is_single else len(losses), gradient="mgda", source="features", heads=heads, scale=scale)
        results.append((stage.backward(losses, features=z), flat_grad(model)))
    assert [gradients is not None for gradients in taken] == [kind != "mixed"]
    torch.testing.assert_close(results[0][0].gramian, results[1][0].gramian)
    torch.testing.assert_close(results[0][1], results[1][1])
    if kind != "mixed":
        assert torch.equal(results[0][0].gramian, results[0][0].gramian.diagonal().diag())


def test_features_with_hooks_or_paths_around_them_need_one_pass_for_each_sample(monkeypatch):
    results = []
    for is_single in (True, False):
        model = Split()
        z, losses = model.run()
        z.register_hook(lambda g: g / (1 + g.norm()))
        stage = Balancer(None if is_single else len(losses), gradient="mgda", source="features")
        results.append((stage.backward(losses, features=z), flat_grad(model)))
    torch.testing.assert_close(results[0][0].gramian, results[1][0].gramian)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_features_as_a_hint():
    model, other = Split(), Split()
    for stage, m in ((Balancer(None, gradient="mgda"), model), (Balancer(6, gradient="mgda"), other)):
        z, losses = m.run()
        stage.backward(losses, shared=m.trunk.parameters(), features=z)
    torch.testing.assert_close(flat_grad(model), flat_grad(other))


def test_priorities_and_turns_belong_to_tasks_that_last():
    with pytest.raises(ValueError, match="belong to no task"):
        Balancer(None, gradient="mgda", weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="keeps state by task"):
        Balancer(None, gradient=compose.switch({0: "mgda"}))


def test_the_metric_of_an_optimizer_takes_one_pass_for_each_sample():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters())
    net(x).square().sum().backward()
    optimizer.step()
    reports = []
    for tasks in (None, 5):
        losses = net(x).square().sum(dim=1)
        reports.append(Balancer(tasks, gradient="mgda", metric=optimizer).backward(losses, shared=net.parameters()))
    torch.testing.assert_close(reports[0].gramian, reports[1].gramian)
