"""The exact solution, the residual and its gradients, and the course of a run on Burgers' equation."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from balance.comparison.recorded_run import RecordedRun
from balance.comparison.tables import render
from experiments import baselines, compare
from experiments.problems.burgers import DataConfig, build_model, counts, load, losses, metrics, targets
from experiments.problems.burgers import __main__ as figure_command
from experiments.problems.burgers.model import ModelConfig
from experiments.problems.burgers.solution import VISCOSITY, solution
from experiments.sweeps.plan import Configuration, Sweep, plan
from tests.experiments.short_runs import prepare, refused, train

# --- exact solution --------------------------------------------------------------------------------------------------


def cole_hopf(x, t):
    """The solution by adaptive quadrature over the real line, in the variable y of the initial condition."""

    def integral(of):
        peak = 50.0  # exponents are at most 50
        return quad(
            lambda y: of(y) * math.exp(-50 * math.cos(math.pi * y) - (x - y) ** 2 / (4 * VISCOSITY * t) - peak),
            *(x - 2, x + 2),
            points=sorted({float(k) for k in range(-3, 4) if abs(k - x) < 2} | {x}),
            limit=500,
            epsrel=1e-12,
            epsabs=0,
        )[0]

    return -integral(lambda y: math.sin(math.pi * y)) / integral(lambda y: 1.0)


@pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
def test_solution_is_that_of_adaptive_quadrature(t):
    x = np.array([-0.97, -0.5, -0.1, -0.01, 0.003, 0.2, 0.8])
    expected = [cole_hopf(place, t) for place in x]
    np.testing.assert_allclose(solution(x, np.full(len(x), t)), expected, rtol=1e-9)


def test_solution_satisfies_the_equation():
    """Central differences of fourth order; around the front the derivatives are in the hundreds."""
    x, t = (axis.ravel() for axis in np.meshgrid([-0.7, -0.02, 0.005, 0.3], [0.1, 0.4, 0.9]))
    h = 1e-3

    def derivative(along, order):
        values = [solution(x + k * h * (along == "x"), t + k * h * (along == "t")) for k in range(-3, 4)]
        rows = {1: ([-1, 9, -45, 0, 45, -9, 1], 60), 2: ([2, -27, 270, -490, 270, -27, 2], 180)}
        stencil, divisor = rows[order]
        return np.tensordot(stencil, values, axes=1) / (divisor * h**order)

    terms = [derivative("t", 1), solution(x, t) * derivative("x", 1), -VISCOSITY * derivative("x", 2)]
    assert np.abs(sum(terms)).max() < 1e-5 * max(np.abs(term).max() for term in terms)
    assert max(np.abs(term).max() for term in terms) > 1


def test_solution_fulfils_both_conditions():
    x, t = np.linspace(-1, 1, 41), np.linspace(0, 1, 41)
    np.testing.assert_allclose(solution(x, np.zeros(41)), -np.sin(math.pi * x), atol=1e-12)
    for side in (-1.0, 1.0):
        np.testing.assert_allclose(solution(np.full(41, side), t), 0, atol=1e-12)


# --- data ------------------------------------------------------------------------------------------------------------


def test_each_loss_has_points_of_its_own():
    data = load(DataConfig(interior_points=30, boundary_points=20, initial_points=10))
    points, kinds, exact = data.train[:]
    assert counts(data.train[:]) == {"residual": 30, "boundary": 20, "initial": 10}
    x, t = points.T
    assert set(x[kinds == 1].tolist()) == {-1.0, 1.0}
    assert not t[kinds == 2].any()
    assert (x[kinds == 0].abs() < 1).all()
    assert (t[kinds == 0] > 0).all()
    torch.testing.assert_close(exact[kinds == 2], -torch.sin(math.pi * x[kinds == 2]))
    torch.testing.assert_close(exact[kinds == 1], torch.zeros(20), atol=1e-6, rtol=0)


def test_the_grids_differ_and_contain_all_kinds():
    data = load(DataConfig())
    assert len(data.validation) == 60 * 30
    assert len(data.test) == 201 * 51
    assert counts(data.test[:]) == {"residual": 199 * 50, "boundary": 2 * 50, "initial": 201}


def test_seeds_draw_points():
    first, again, other = (load(DataConfig(seed=seed)).train[:][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- losses and metrics ----------------------------------------------------------------------------------------------


def batch(points=16):
    return load(DataConfig(interior_points=points, boundary_points=5, initial_points=6)).train[:]


def test_residual_is_that_of_finite_differences():
    model = build_model(ModelConfig(width=8, depth=2)).double()
    points = torch.rand(9, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    h, step = 1e-4, torch.eye(2, dtype=torch.float64)

    def u(shift):
        return model(points + h * shift)["initial"].detach()

    u_x, u_t = ((u(e) - u(-e)) / (2 * h) for e in step)
    u_xx = (u(step[0]) - 2 * u(torch.zeros(2)) + u(-step[0])) / h**2
    expected = u_t + u(torch.zeros(2)) * u_x - VISCOSITY * u_xx
    torch.testing.assert_close(model(points)["residual"][:, 1].detach(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_residual_loss():
    """They go through the derivatives with respect to the inputs."""
    model, data = build_model(ModelConfig(width=4, depth=2)).double(), batch()
    data = (data[0].double(), data[1], data[2].double())
    weight = model.trunk.layers[0].weight

    def loss(change):
        with torch.no_grad():
            weight[0, 0] += change
            value = losses(model(data[0]), data)["residual"].item()
            weight[0, 0] -= change
        return value

    losses(model(data[0]), data)["residual"].backward()
    assert weight.grad[0, 0].item() == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


def test_outputs_are_equal_without_gradients_and_require_none():
    model, (points, *_) = build_model(), batch()
    with torch.no_grad():
        outputs = model(points)
    for task, expected in model(points).items():
        assert expected.requires_grad
        assert not outputs[task].requires_grad
        assert torch.equal(outputs[task], expected)
    assert not points.requires_grad


def test_losses_by_hand():
    points, kinds, exact = batch()
    fields = torch.randn(len(points), 2)
    outputs = {"residual": fields, "boundary": fields[:, 0], "initial": fields[:, 0]}
    result = losses(outputs, (points, kinds, exact))
    torch.testing.assert_close(result["residual"], (fields[:16, 1] ** 2).mean())
    torch.testing.assert_close(result["boundary"], ((fields[16:21, 0] - exact[16:21]) ** 2).mean())
    torch.testing.assert_close(result["initial"], ((fields[21:, 0] - exact[21:]) ** 2).mean())


def test_a_batch_without_points_of_a_kind_has_no_such_loss():
    points, kinds, exact = (part[:16] for part in batch())
    model = build_model()
    assert set(losses(model(points), (points, kinds, exact))) == {"residual"}


def test_metrics_by_hand():
    points, kinds, exact = batch()
    fields = torch.stack([exact + 0.1, torch.zeros_like(exact)], dim=1)
    outputs = {"residual": fields, "boundary": fields[:, 0], "initial": fields[:, 0]}
    expected = {"residual/relative_l2": 0.1 * math.sqrt(len(exact)) / exact.norm().item()}
    expected |= {"boundary/rmse": 0.1, "initial/rmse": 0.1}
    for name, metric in metrics().items():
        task = name.partition("/")[0]
        for half in (slice(10), slice(10, None)):  # batches add up
            metric.update(outputs[task][half], targets((points, kinds, exact))[task][half])
        assert metric.compute().item() == pytest.approx(expected[name], rel=1e-5)


# --- commands --------------------------------------------------------------------------------------------------------


SMALL = ["data.interior_points=150", "data.boundary_points=20", "data.initial_points=30", "model.width=10", "model.depth=2"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Final metrics and folder of a run of a few seconds."""
    folder = tmp_path_factory.mktemp("burgers")
    words = ["--experiment=burgers", *SMALL, "--loss_method=constant", "loss.weights=[0.1,1,10]", "lbfgs.max_iter=20"]
    final = train(*words, "train.epochs=1", "train.lbfgs_steps=8", "track=false", f"output_dir={folder}")
    (run,) = (folder / "burgers").iterdir()
    return final, run


def test_training_reduces_the_error(short_run):
    final, _ = short_run
    assert final["residual/relative_l2"] < 0.65  # a network that answers zero has 1
    assert final["initial/rmse"] < 0.2


def test_figure_of_runs(short_run, tmp_path, capsys):
    _, folder = short_run
    assert figure_command.main([str(folder), str(folder), f"--output={tmp_path}/burgers.png"]) == 0
    assert (tmp_path / "burgers.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "config.yaml").write_text("experiment: digits\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        figure_command.main([str(tmp_path), f"--output={tmp_path}/other.png"])
    assert "Runs must be of the experiment 'burgers'" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()


def recorded_run(seed, error):
    numbers = {"residual/relative_l2": error, "boundary/rmse": 0.1, "initial/rmse": 0.1}
    return RecordedRun(str(seed), "ls", None, seed, {}, numbers, fingerprint=str(seed))


def test_tables_have_no_delta_m():
    runs = [recorded_run(seed, error) for seed, error in enumerate((0.2, 0.4))]
    text = render(compare.compare("burgers", runs, runs, None), "csv")
    assert "residual/relative_l2,0.3" in text.replace('"', "")
    assert "delta_m" not in text
    assert "single-task" not in text


def test_sweeps_train_no_single_task_networks():
    sweep = Sweep(
        (Configuration("ls", "none"), Configuration("relobralo", "none")), (0,), ("experiment=burgers", "track=false")
    )
    assert [job.config.loss_method for job in plan(sweep, create=False)] == ["ls", "relobralo"]


def test_baselines_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        baselines.main(["--experiment=burgers", "--output=file.yaml"])
    assert "has no single-task baselines" in capsys.readouterr().err


def test_a_run_without_a_task_of_points_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(["--experiment=burgers", "data.initial_points=0"], capsys, tmp_path)
    assert "data.initial_points must be at least 1, but got 0" in error.replace("\n", " ")


def test_points_are_the_same_for_all_seeds_of_a_run(tiny):
    points = [prepare(*tiny("burgers", f"seed={seed}")).data.train[:][0] for seed in (0, 1)]
    assert torch.equal(*points)
