import numpy as np
import pytest
import torch

from balance import gradient_balancers
from experiments.problems.toy.__main__ import main, trajectories
from experiments.problems.toy.descent import BETA2, LR, METHODS, OPTIONS, STEPS, build_balancer, descend, pairing
from experiments.problems.toy.figure import reached_front
from experiments.problems.toy.landscape import STARTS, values
from tests.experiments.problems import toy_closed_forms

BOTTOM = -8.3552  # b of the Pareto set in its middle
CLOSED = {"famo": {"gamma": 0.0}}  # options of the closed forms: those of the problem


@pytest.mark.parametrize("method", METHODS)
def test_closed_form_is_the_stage(method):
    """At the published rate, and with longer steps through valleys, kinks and conflicts."""
    for starts, steps, lr, beta2 in ((STARTS, 8, 1e-3, 0.999), (((-8.5, 7.5), (9.0, 9.0), (9.0, -1.0)), 60, 0.05, 0.99)):
        fast = toy_closed_forms.descend([method], starts, steps, CLOSED, lr=lr, beta2=beta2)[method]
        for k, start in enumerate(starts):
            slow = descend(build_balancer(method), start, steps, lr=lr, beta2=beta2)
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
    fast = toy_closed_forms.descend([method], [start], 40, {method: options}, lr=0.05)[method]
    slow = descend(build_balancer(method, {method: OPTIONS.get(method, {}) | options}), start, 40, lr=0.05, beta2=0.999)
    np.testing.assert_allclose(fast[:, 0], slow, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["mgda", "pcgrad", "cagrad", "nashmtl"])
def test_closed_form_weights_of_special_gramians(method):
    """Equal, opposite, orthogonal, parallel and zero gradients."""
    gradients = np.array(
        [[[1, 2], [1, 2]], [[1, 2], [-1, -2]], [[1, 0], [0, 3]], [[1, 2], [3, 6]], [[0, 0], [1, 2]], [[0, 0], [0, 0.0]]]
    )
    G = np.einsum("skp,slp->skl", gradients, gradients)
    closed = toy_closed_forms.CLOSED_FORMS[method]()(np.ones((2, len(G))), (G[:, 0, 0], G[:, 0, 1], G[:, 1, 1]))
    rule = gradient_balancers.build(method)
    expected = [rule(torch.from_numpy(gramian)).numpy() for gramian in G]
    directions = [np.einsum("ks,skp->sp", np.array(w), gradients) for w in (closed, np.array(expected).T)]
    np.testing.assert_allclose(*directions, atol=1e-12)


def test_closed_forms_of_all_methods_at_once_are_each_method_separately():
    together = toy_closed_forms.descend(METHODS, STARTS, 20, CLOSED)
    for method in METHODS:
        alone = toy_closed_forms.descend([method], STARTS[1:2], 20, CLOSED)[method]
        np.testing.assert_allclose(together[method][:, 1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["uw+mgda", "scaleinvls+pcgrad", "dwa", "rlw+graddrop", "imtl", "igbv1"])
def test_any_pairing_has_trajectories(method):
    path = trajectories([method, "ls"], 12)
    assert list(path) == [method, "ls"]
    assert path[method].shape == (13, 5, 2)
    assert np.isfinite(path[method]).all()
    assert np.abs(path[method][-1] - STARTS).max(axis=1).min() > 0.005


@pytest.mark.slow
def test_trajectories_are_equal_whatever_the_number_of_processes():
    alone, in_two = (trajectories(["rlw", "pcgrad"], 20, jobs=jobs) for jobs in (1, 2))
    for method, path in alone.items():
        assert np.array_equal(path, in_two[method])
        assert np.array_equal(path[:, 4], descend(build_balancer(method), STARTS[4], 20))


def test_names_of_pairings():
    assert pairing("famo") == (("famo",), None)
    assert pairing("mgda") == (("ls",), "mgda")
    assert pairing("scaleinvls+rlw+mgda") == (("scaleinvls", "rlw"), "mgda")
    with pytest.raises(ValueError, match=r"must come last, but got 'mgda\+uw'. Write for example uw\+mgda"):
        pairing("mgda+uw")
    with pytest.raises(ValueError, match="Did you mean 'mgda'"):
        pairing("mdga")


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


def on_front(paths):
    return {method: reached_front(path[-1]).tolist() for method, path in paths.items()}


@pytest.mark.slow
def test_end_points_of_the_published_steps():
    paths = toy_closed_forms.descend(METHODS, STARTS, 50_000, CLOSED)
    assert on_front(paths) == ON_FRONT
    for k in (0, 1, 3, 4):
        np.testing.assert_allclose(paths["ls"][-1, k], LS_END, atol=0.01)
    np.testing.assert_allclose(paths["ls"][-1, 2], [5, 3.913], atol=0.1)
    assert values(paths["ls"][-300:, 2]).mean() > -1.5  # it swings about the singular valley of f2
    np.testing.assert_allclose(paths["famo"][-1], FAMO_ENDS, atol=0.1)
    assert (np.abs(paths["famo"][-1, :, 1] - BOTTOM) < 0.1).all()
    assert (np.abs(paths["famo"][-1, :, 0]) < 7.05).all()
    np.testing.assert_allclose(values(paths["famo"][-1])[:, 1], [-15.45, -14.997, -14.566, -16.332, -12.352], atol=0.15)


@pytest.mark.slow
def test_end_points_of_the_printed_starts():
    paths = toy_closed_forms.descend(["ls", "famo"], [(10, -8), (-8.5, 5)], 50_000, CLOSED)
    np.testing.assert_allclose(paths["ls"][-1], [LS_END, LS_END], atol=0.01)
    np.testing.assert_allclose(paths["famo"][-1], [(6.998, -8.434), (-0.128, -8.356)], atol=0.1)


def test_the_steps_of_the_figure_end_on_the_same_side_as_the_published_ones():
    assert on_front(toy_closed_forms.descend(METHODS, STARTS, STEPS, CLOSED, lr=LR, beta2=BETA2)) == ON_FRONT


# --- the figure ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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
