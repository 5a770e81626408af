import math

import numpy as np
import pytest
import torch

from balance import Balancer
from experiments.problems.toy import DataConfig, ModelConfig, build_model, closed_forms, load, losses, metrics, targets
from experiments.problems.toy import landscape as field
from experiments.problems.toy.__main__ import main
from experiments.problems.toy.descent import METHODS, OPTIONS, build_balancer, descend, pairing, trajectories
from experiments.problems.toy.figure import reached_front
from experiments.problems.toy.landscape import STARTS, pareto_set, values, values_and_gradients

BOTTOM = -8.3552  # b of the Pareto set in its middle


# --- landscape -------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    # far above b = 0 all tanh are 1 or -1: f1 = log|(-a - 7) / 2 + 1| + 6, f2 = log|(-a + 3) / 2 + 1| + 6
    np.testing.assert_allclose(values(np.array([7.0, 50.0]), scale=1), [math.log(6) + 6, 6], rtol=1e-12)
    # far below it the bowls are left
    np.testing.assert_allclose(values(np.array([4.0, -58.0]), scale=0.1), [0.1 * (0.9 + 25 - 20), 12.1 + 25 - 20], rtol=1e-12)
    assert (values(np.zeros(2)) == 0).all()


def test_the_second_logarithm_has_the_sign_of_the_codes():
    """With it the valley of f2 lies at a = 5, with the printed one at a = 9."""
    np.testing.assert_allclose(values(np.array([5.0, 50.0]))[1], math.log(5e-6) + 6, rtol=1e-12)
    assert values(np.array([9.0, 50.0]))[1] > 6


def test_both_tasks_pull_on_the_kink():
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logarithm, bowl = math.log(3.5) + 6, (49 + 6.4) / 10 - 20  # f1 = f2 and g1 = g2 at (0, 0)
    for task in ("f1", "f2"):
        (gradient,) = torch.autograd.grad(field.losses(point)[task], point)
        np.testing.assert_allclose(gradient, [0, 0.5 * logarithm - 0.5 * bowl], rtol=1e-12)


def test_closed_derivatives_are_those_of_autograd():
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.uniform(-11, 11, (300, 2)), STARTS, [[3, 0], [5, 30], [-5, 1e-9], [5, -40]]])
    tensor = torch.tensor(points, requires_grad=True)
    found = [field.losses(tensor)[task] for task in ("f1", "f2")]
    gradients = np.array([torch.autograd.grad(loss.sum(), tensor)[0].T.numpy() for loss in found])
    L, J = values_and_gradients(points.T.copy(), scale=0.3)
    np.testing.assert_allclose(L, [[0.3], [1]] * torch.stack(found).detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(J, [[[0.3]], [[1]]] * gradients, rtol=1e-9, atol=1e-12)


def test_losses_lie_above_their_bound():
    side = np.linspace(-12, 12, 401)
    found = values(np.stack(np.meshgrid(side, side), axis=-1), scale=1)
    assert found.min() > field.LOWER_BOUND + 0.9


def test_pareto_set():
    front = pareto_set(101)
    assert front[50] == pytest.approx([0, BOTTOM], abs=1e-4)
    _, J = values_and_gradients(front.T.copy())
    cosines = (J[0] * J[1]).sum(axis=0)[1:-1] / np.sqrt((J[0] ** 2).sum(axis=0) * (J[1] ** 2).sum(axis=0))[1:-1]
    np.testing.assert_allclose(cosines, -1, atol=1e-9)
    assert np.linalg.norm(J[1, :, 0]) < 1e-6  # the ends are the minima
    assert np.linalg.norm(J[0, :, -1]) < 1e-6
    L = values(front)
    assert (np.diff(L[:, 0]) < 0).all()
    assert (np.diff(L[:, 1]) > 0).all()


def test_no_point_of_the_plane_is_better_in_both_than_the_pareto_set():
    side = np.linspace(-11, 11, 301)
    others = values(np.stack(np.meshgrid(side, side), axis=-1)).reshape(-1, 2)
    front = values(pareto_set(401))
    for point in front[::20]:
        assert not (others < point - 1e-4).all(axis=1).any()


# --- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_closed_form_is_the_stage(method):
    """At the published rate, and with longer steps through valleys, kinks and conflicts."""
    for starts, steps, lr in ((STARTS, 8, 1e-3), (((-8.5, 7.5), (9.0, 9.0), (9.0, -1.0)), 60, 0.05)):
        fast = closed_forms.descend([method], starts, steps, OPTIONS, lr=lr)[method]
        for k, start in enumerate(starts):
            slow = descend(build_balancer(method), start, steps, lr=lr)
            assert np.abs(slow - slow[0]).max() > 0.2 * steps * lr
            np.testing.assert_allclose(fast[:, k], slow, rtol=0, atol=1e-6, err_msg=f"{start} {lr}")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cagrad", {"c": 0.9}),
        ("cagrad", {"c": 1.5}),
        ("nashmtl", {"max_norm": None}),
        ("nashmtl", {"max_norm": 3.0}),
        ("famo", {"gamma": 0.01, "lr": 0.1}),
        ("go4align", {"step_size": 1e-2}),
    ],
)
def test_closed_form_takes_the_options_of_the_library(method, options):
    start = (9.0, -1.0)
    fast = closed_forms.descend([method], [start], 40, {method: options}, lr=0.05)[method]
    slow = descend(build_balancer(method, {method: options}), start, 40, lr=0.05)
    np.testing.assert_allclose(fast[:, 0], slow, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "cagrad", "nashmtl"])
def test_closed_form_weights_of_special_gramians(method):
    """Equal, opposite, orthogonal, parallel and zero gradients."""
    gradients = np.array(
        [[[1, 2], [1, 2]], [[1, 2], [-1, -2]], [[1, 0], [0, 3]], [[1, 2], [3, 6]], [[0, 0], [1, 2]], [[0, 0], [0, 0.0]]]
    )
    G = np.einsum("skp,slp->skl", gradients, gradients)
    found = closed_forms.CLOSED_FORMS[method]()(np.ones((2, len(G))), (G[:, 0, 0], G[:, 0, 1], G[:, 1, 1]))
    rule = build_balancer(method).gradient_balancer.rule
    expected = [rule(torch.from_numpy(gramian)).numpy() for gramian in G]
    directions = [np.einsum("ks,skp->sp", np.array(w), gradients) for w in (found, np.array(expected).T)]
    np.testing.assert_allclose(*directions, atol=1e-12)


def test_all_methods_at_once_are_each_alone():
    together = closed_forms.descend(METHODS, STARTS, 20, OPTIONS)
    for method in METHODS:
        alone = closed_forms.descend([method], STARTS[1:2], 20, OPTIONS)[method]
        np.testing.assert_allclose(together[method][:, 1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["uw+mgda", "scaleinvls+pcgrad", "dwa", "rlw+graddrop", "imtl", "igbv1"])
def test_any_pairing_goes_through_the_stage(method):
    told = []
    path = trajectories([method, "ls"], STARTS[:2], 12, advance=lambda of, done: told.append((of, done)))
    assert list(path) == [method, "ls"]
    assert path[method].shape == (13, 2, 2)
    assert np.isfinite(path[method]).all()
    assert np.abs(path[method][-1] - STARTS[:2]).max(axis=1).min() > 0.005
    assert told == [("ls", 12), (method, 12), (method, 12)]


def test_options_without_a_closed_form_go_through_the_stage():
    told = []
    path = trajectories(
        ["cagrad"], [(9, -1)], 20, options={"cagrad": {"c": 0.9, "rescale": 0}}, advance=lambda *of: told.append(of)
    )
    expected = descend(build_balancer("cagrad", {"cagrad": {"c": 0.9, "rescale": 0}}), (9, -1), 20)
    assert np.array_equal(path["cagrad"][:, 0], expected)
    assert closed_forms.has("cagrad", {"c": 0.9})
    assert not closed_forms.has("cagrad", {"rescale": 0})
    assert not closed_forms.has("imtl", {})


def test_names_of_pairings():
    assert pairing("famo") == (("famo",), None)
    assert pairing("mgda") == (("ls",), "mgda")
    assert pairing("scaleinvls+rlw+mgda") == (("scaleinvls", "rlw"), "mgda")
    with pytest.raises(ValueError, match=r"must come last, but got 'mgda\+uw'. Write for example uw\+mgda"):
        pairing("mgda+uw")
    with pytest.raises(ValueError, match="Did you mean 'mgda'"):
        pairing("mdga")
    with pytest.raises(ValueError, match="Unknown closed form 'uw'"):
        closed_forms.descend(["uw"], STARTS, 1, {})


def test_both_forms_of_famo_are_one_where_all_batches_are_the_same():
    balancer = build_balancer("famo", {"famo": {"gamma": 0.0, "next_batch": False}})
    assert balancer.needs_observation
    again, published = (descend(stage, (9.0, -1.0), 30, lr=0.05) for stage in (balancer, build_balancer("famo")))
    np.testing.assert_allclose(again, published, rtol=0, atol=1e-12)


def test_which_points_are_on_the_front():
    assert reached_front(np.array([[0, BOTTOM], [6.9, -8.44], [7.2, -8.44], [0, -8.1], [5, 3.9]])).tolist() == [1, 1, 0, 0, 0]


# The table of reference end points: (a, b) after 50,000 steps, within rounding of float32 and of the oscillation at the front
LS_END = (-5.727, -8.409)
FAMO_ENDS = [(-0.261, -8.357), (0.068, -8.355), (0.366, -8.354), (-0.951, -8.351), (1.741, -8.356)]
ON_FRONT = {
    "ls": [1, 1, 0, 1, 1],
    "mgda": [1, 1, 1, 1, 1],
    "pcgrad": [1, 1, 0, 1, 1],
    "cagrad": [1, 1, 0, 1, 1],
    "nashmtl": [1, 1, 1, 1, 1],
    "famo": [1, 1, 1, 1, 1],
    "go4align": [0, 1, 1, 1, 1],
}


@pytest.mark.slow
def test_end_points():
    found = trajectories()
    assert {method: reached_front(path[-1]).tolist() for method, path in found.items()} == ON_FRONT
    for k in (0, 1, 3, 4):
        np.testing.assert_allclose(found["ls"][-1, k], LS_END, atol=0.01)
    np.testing.assert_allclose(found["ls"][-1, 2], [5, 3.913], atol=0.1)
    assert values(found["ls"][-300:, 2]).mean() > -1.5  # it swings about the singular valley of f2
    np.testing.assert_allclose(found["famo"][-1], FAMO_ENDS, atol=0.1)
    assert (np.abs(found["famo"][-1, :, 1] - BOTTOM) < 0.1).all()
    assert (np.abs(found["famo"][-1, :, 0]) < 7.05).all()
    np.testing.assert_allclose(values(found["famo"][-1])[:, 1], [-15.45, -14.997, -14.566, -16.332, -12.352], atol=0.15)


@pytest.mark.slow
def test_end_points_of_the_printed_starts():
    found = trajectories(["ls", "famo"], [(10, -8), (-8.5, 5)])
    np.testing.assert_allclose(found["ls"][-1], [LS_END, LS_END], atol=0.01)
    np.testing.assert_allclose(found["famo"][-1], [(6.998, -8.434), (-0.128, -8.356)], atol=0.1)


# --- the experiment of the trainer -----------------------------------------------------------------------------------


def test_the_experiment_is_the_landscape():
    model = build_model(ModelConfig(a=9.0, b=-1.0))
    splits = load(DataConfig(steps=7, scale=0.5))
    assert [len(split) for split in splits] == [7, 1, 1]
    batch = splits.train[[0, 3]]
    outputs = model(batch[0])
    L = values(np.array([9.0, -1.0]), scale=0.5)
    assert [loss.item() for loss in losses(outputs, batch).values()] == pytest.approx([L[0] + 10.5, L[1] + 21], rel=1e-5)
    assert [p.tolist() for p in model.trunk.parameters()] == [[[9.0, -1.0]]]
    assert list(model.heads.parameters()) == []
    found = {name: metric(outputs[name[:2]], targets(batch)[name[:2]]).item() for name, metric in metrics().items()}
    assert found == pytest.approx({"f1/above_bound": 2 * L[0] + 21, "f2/above_bound": L[1] + 21}, rel=1e-5)


def test_steps_of_the_experiment_are_those_of_the_trajectory():
    model, splits = build_model(ModelConfig(a=9.0, b=-1.0)), load(DataConfig())
    balancer = Balancer(("f1", "f2"), gradient="mgda")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(40):
        batch = splits.train[[step]]
        optimizer.zero_grad()
        balancer.backward(losses(model(batch[0]), batch), shared=model.trunk.parameters())
        optimizer.step()
    expected = descend(build_balancer("mgda"), (9.0, -1.0), 40, lr=0.05)
    np.testing.assert_allclose(model.trunk.theta.detach()[0], expected[-1], atol=1e-3)


@pytest.mark.parametrize(("config", "message"), [({"steps": 0}, "at least 1"), ({"scale": 0.0}, "must be positive")])
def test_bad_data(config, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(**config))


# --- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_is_written(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "new"), "--steps", "8", "--methods", "famo", "uw+mgda", "famo"]) == 0
    assert (tmp_path / "new" / "toy.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "new" / "toy.pdf").read_bytes()[:4] == b"%PDF"
    out = capsys.readouterr().out
    assert out.count("uw+mgda") == 5
    assert out.count("famo") == 5
    assert "toy.pdf" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fam"], "Did you mean 'famo'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--scale", "-1"], "--scale must be positive"),
    ],
)
def test_mistakes_in_the_command(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
