"""Steps of LBFGS after the epochs."""

import copy
import signal

import pytest
import torch
from torch import nn

from balance.stage.report import Report
from experiments import trainer
from experiments.problems import digits
from experiments.problems.base import Network
from experiments.sweeps import runtime
from experiments.training import loop, ranks
from experiments.training.checkpoint_files import load
from experiments.training.evaluation import evaluate
from experiments.training.lbfgs import LBFGSPhase, held_weights
from experiments.training.lbfgs_checks import check_lbfgs
from experiments.training.run import build
from experiments.training.step import compute_losses
from tests.experiments.short_runs import TINY, configure, prepare
from tests.experiments.training.interruptions import Runs, interrupt, raise_killed, send

LINEAR = ["--experiment=regression100", "lbfgs.max_iter=100"]


SMALL = ["data.interior_points=40", "data.boundary_points=10", "data.initial_points=10", "model.width=6", "model.depth=2"]


def small(*words):
    return build(configure("--experiment=burgers", *SMALL, "train.lbfgs_steps=2", *words))


def parameters(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


# --- weights ---------------------------------------------------------------------------------------------------------


def report(weights):
    weights = torch.tensor(weights)
    return Report(("a", "b", "c"), weights, weights, weights, weights, total_weights=weights)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([1.0, 2.0, 3.0], [0.5, 1.0, 1.5]), ([-1.0, 2.0, 6.0], [0.0, 0.75, 2.25]), ([-1.0, 0.0, -2.0], [1.0, 1.0, 1.0])],
)
def test_held_weights(given, expected):
    assert list(held_weights(report(given)).values()) == pytest.approx(expected)


def test_weights_are_computed_once_per_step_and_rules_learn_once(monkeypatch):
    run = small("--loss_method=rlw")
    calls, backward = [], run.balancer.backward

    def counted(*arguments, **keywords):
        calls.append(backward(*arguments, **keywords))
        return calls[-1]

    monkeypatch.setattr(run.balancer, "backward", counted)
    phase = LBFGSPhase(run)
    evaluations = [phase.step(number)[1]["lbfgs/evaluations"] for number in range(2)]
    assert len(calls) == 2
    assert not torch.equal(calls[0].total_weights, calls[1].total_weights)  # random weights are drawn anew
    assert min(evaluations) > 20
    assert sum(evaluations) == phase.evaluations


def test_a_step_is_lbfgs_on_the_weighted_sum():
    """The same iterations by hand, with the weights of a gradient balancer after a loss balancer."""
    run = small("--loss_method=uw", "--gradient_method=cagrad", "lbfgs.max_iter=4")
    model, data = copy.deepcopy(run.model), run.data.train[:]
    total = run.balancer.weights(compute_losses(run, data)[1], shared=run.model.trunk.parameters()).total_weights
    weights = total / total.mean()
    options = {"history_size": 50, "tolerance_grad": 1e-9, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, **options)

    def closure():
        optimizer.zero_grad()
        losses = run.problem.losses(model(data[0]), data)
        (weights * torch.stack([*losses.values()])).sum().backward()
        return (weights * torch.stack([*losses.values()])).sum()

    optimizer.step(closure)
    before = [parameter.clone() for parameter in run.balancer.parameters()]
    LBFGSPhase(run).step(0)
    by_hand = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(parameters(run), by_hand, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, run.balancer.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in run.balancer.parameters())


@pytest.mark.parametrize("methods", [["--loss_method=ls"], ["--loss_method=famo"], ["--gradient_method=pcgrad"]])
@pytest.mark.filterwarnings("ignore:shared must hold parameters that several tasks reach")
def test_it_finds_the_least_squares_solution(methods):
    """Every task has separate parameters there, so that all weights have the same minimum."""
    run = build(configure(*LINEAR, *methods, "train.lbfgs_steps=2"))
    phase = LBFGSPhase(run)
    for number in range(2):
        phase.step(number)
    x, y = run.data.train[:]
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1).double(), y.double()).solution
    torch.testing.assert_close(run.model.trunk.weight.detach().double(), expected[:-1].T, atol=1e-4, rtol=0)


def test_rules_of_epochs_and_of_observations_learn(monkeypatch):
    run = small("--loss_method=famo+dwa")
    ends, observed = [], []
    monkeypatch.setattr(run.balancer, "end_epoch", lambda: ends.append(None))
    monkeypatch.setattr(run.balancer, "observe", lambda losses, counts: observed.append(losses))
    LBFGSPhase(run).step(0)
    assert (len(ends), len(observed)) == (1, 1)
    expected = compute_losses(run, run.data.train[:])[1]
    assert all(torch.equal(observed[0][task], loss) for task, loss in expected.items())


# --- the batch -------------------------------------------------------------------------------------------------------


def test_batch_is_all_training_data_or_fixed_samples_of_it():
    assert len(LBFGSPhase(small()).read_batch()[0]) == 60
    first, again, other = (LBFGSPhase(small("lbfgs.samples=30", f"seed={seed}")).read_batch()[0] for seed in (0, 0, 1))
    assert len(first) == 30
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_is_drawn_once_and_drawn_again_after_resuming():
    words = ["data.train_pairs=50", "train.lbfgs_steps=1"]
    run, resumed = (build(configure(*words)) for _ in range(2))
    phase = LBFGSPhase(run)
    batch = phase.read_batch()
    assert phase.read_batch() is batch
    run.data.train[[0, 1]]
    other = LBFGSPhase(resumed)
    resumed.data.train[[3]]  # the generator is elsewhere
    other.load_state_dict(phase.state_dict())
    assert torch.equal(other.read_batch()[0], batch[0])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.precision=bf16"], "train.precision must be fp32 .* but got bf16"),
        (["lbfgs.line_search=armijo"], "lbfgs.line_search"),
        (["lbfgs.max_iter=0"], "lbfgs.max_iter must be at least 1, but got 0"),
        (["train.report_last=60"], r"train.report_last must be at most train.epochs=10 \+ train.lbfgs_steps=2, but got 60"),
    ],
)
def test_it_is_refused_before_training(words, message):
    with pytest.raises(ValueError, match=message):
        configure("--experiment=burgers", "train.lbfgs_steps=2", *words)


def test_rules_that_give_a_direction_leave_the_loss_weights_to_hold(tmp_path, capsys):
    words = [
        "--experiment=burgers",
        *TINY["burgers"],
        "track=false",
        "train.epochs=1",
        "lbfgs.max_iter=2",
        f"output_dir={tmp_path}",
    ]
    methods = ["--gradient_method=lr_annealing", "--loss_method=constant", "loss.weights=[1,2,6]"]
    assert trainer.main([*words, *methods, "train.lbfgs_steps=2"]) == 0
    assert (
        capsys.readouterr().out.count("lr_annealing gives a direction and no weights: LBFGS keeps the loss weights only.") == 1
    )
    run = prepare(*words, *methods, "train.lbfgs_steps=2")
    phase = LBFGSPhase(run)
    weights = held_weights(phase.balance(phase.read_batch()))
    assert weights == pytest.approx({"residual": 1 / 3, "boundary": 2 / 3, "initial": 2})


def test_random_losses_are_refused(monkeypatch):
    build_model = digits.build_model

    def with_dropout():
        model = build_model()
        return Network(nn.Sequential(model.trunk, nn.Dropout(0.5)), model.heads)

    monkeypatch.setattr(digits, "build_model", with_dropout)
    build(configure("data.train_pairs=50"))
    with pytest.raises(ValueError, match=r"equal when they are computed twice .* the loss of 'left' was"):
        build(configure("data.train_pairs=50", "train.lbfgs_steps=1"))


def test_several_processes_are_refused(monkeypatch):
    run = small()
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(ValueError, match="LBFGS must run in one process, but torchrun has started 2"):
        check_lbfgs(run.config, run.model, run.problem, run.data.train)


def test_the_check_changes_nothing():
    plain, checked = (build(configure("data.train_pairs=50", f"train.lbfgs_steps={steps}")) for steps in (0, 1))
    assert torch.equal(plain.data.train[[0]][0], checked.data.train[[0]][0])
    assert torch.equal(parameters(plain), parameters(checked))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_step_counts_as_an_epoch(tiny, tmp_path):
    run = prepare(*tiny("burgers", "train.lbfgs_steps=3", "train.report_last=1"))
    final = loop.train(run)
    best, last = (load(next(tmp_path.glob(f"runs/*/*/{name}.pt"))) for name in ("best", "last"))
    assert best["epoch"] == last["epoch"] == 4
    assert last["step"] == len(run.batches) + 3
    run.model.load_state_dict(best["model"])
    assert evaluate(run, run.data.test) == final


def test_the_estimate_of_a_sweep_counts_its_steps(monkeypatch):
    monkeypatch.setattr(runtime, "BUDGET", 0.01)
    monkeypatch.setattr(runtime, "lbfgs_seconds", lambda run: 1000.0)
    words = ["--experiment=burgers", "data.interior_points=40", "train.epochs=1"]
    assert runtime.estimate_run(configure(*words, "train.lbfgs_steps=7")) == pytest.approx(7000, rel=0.1)


def test_time_of_a_step():
    assert runtime.lbfgs_seconds(small("train.lbfgs_steps=0")) == 0
    assert 0 < runtime.lbfgs_seconds(small()) < 20


class BurgersRuns(Runs):
    """Runs on Burgers' equation with three steps of LBFGS."""

    def __init__(self, folder, *words):
        super().__init__(folder)
        methods = ["--experiment=burgers", "--loss_method=relobralo", "--gradient_method=pcgrad", "log_every=1", "track=false"]
        length = ["train.batch_size=30", "train.epochs=1", "train.lbfgs_steps=3", "lbfgs.max_iter=5"]
        self.words = [*methods, *SMALL, *length, *words, f"output_dir={folder}"]

    def state(self):
        (folder,) = (self.folder / "burgers").iterdir()
        return load(folder / "last.pt")


@pytest.mark.parametrize(("act", "number"), [(raise_killed, 1), (send(signal.SIGTERM), 0)], ids=["killed", "terminated"])
def test_resumed_runs_are_undisturbed_runs_bit_for_bit(act, number, tmp_path):
    """A killed process repeats the step that it was in. A terminated one ends it, and its evaluation is repeated."""
    undisturbed, resumed = BurgersRuns(tmp_path / "undisturbed"), BurgersRuns(tmp_path / "resumed")
    final = undisturbed.train()
    for steps in (1, 2):
        interrupt(resumed, LBFGSPhase, "step", number, act)
        state = resumed.state()
        assert (state["epoch"], state["step"]) == (1 + steps if number else steps, 2 + steps)
    assert resumed.train() == final
    assert_equal(undisturbed.state(), resumed.state())


def assert_equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"costs"}:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_equal(*pair)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("multimnist", "nyuv2", "celeba", "quantum_chemistry")]


@pytest.mark.parametrize("name", ["digits", "toy", *SLOW])
def test_every_problem_with_repeatable_losses(name, tiny):
    if name == "quantum_chemistry":
        pytest.importorskip("torch_geometric")
    run = prepare(*tiny(name, "--loss_method=uw", "train.lbfgs_steps=2", "lbfgs.max_iter=5"))
    before = parameters(run)
    loop.train(run)
    assert not torch.equal(parameters(run), before)


def test_checkpoints_of_earlier_versions_load(tmp_path):
    """They have no entry for LBFGS."""
    undisturbed, resumed = BurgersRuns(tmp_path / "undisturbed"), BurgersRuns(tmp_path / "resumed")
    final = undisturbed.train()
    interrupt(resumed, LBFGSPhase, "step", 0, raise_killed)
    (folder,) = (resumed.folder / "burgers").iterdir()
    state = load(folder / "last.pt")
    del state["lbfgs"]
    torch.save(state, folder / "last.pt")
    assert resumed.train() == final
