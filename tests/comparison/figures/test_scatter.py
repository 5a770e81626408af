import math
from dataclasses import replace

import numpy as np
import pytest

from balance.comparison.figures.scatter import cost, most_opposed, pareto, pareto_front
from tests.comparison.figures.reading import assert_no_overlap, legend, words
from tests.comparison.synthetic import comparison, estimate, realistic, row, two_rows

NAN = math.nan


def test_pareto_front():
    points = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.5, 3.0), "d": (4.0, 1.0), "e": (5.0, 2.0), "f": (2.0, 3.0)}
    assert pareto_front(points, (1, 1)) == ["a", "b", "f", "d"]
    assert pareto_front(points, (-1, -1)) == ["e", "c", "a"]
    assert pareto_front(points, (-1, 1)) == ["e", "d"]


def test_pareto_draws_means_errors_front_and_baselines():
    of = two_rows()
    figure = pareto(of, "left/accuracy", "sum/mae")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "left/accuracy, higher is better →"
    assert axes.get_ylabel() == "sum/mae, lower is better ←"
    drawn = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() not in ("None", "")}
    assert drawn == {(line.metrics["left/accuracy"].mean, line.metrics["sum/mae"].mean) for line in of.rows}
    bars = axes.containers[0][2]  # of famo: 0.97 ± 0.01 / sqrt(3) and 1.5 ± 0.25 / sqrt(3)
    assert bars[0].get_segments()[0][:, 0] == pytest.approx([0.97 - 0.01 / math.sqrt(3), 0.97 + 0.01 / math.sqrt(3)])
    assert bars[1].get_segments()[0][:, 1] == pytest.approx([1.5 - 0.25 / math.sqrt(3), 1.5 + 0.25 / math.sqrt(3)])
    (front,) = [line for line in axes.lines if line.get_gid() == "front"]
    assert front.get_xydata() == pytest.approx(np.array([[0.98, 2.25], [0.97, 2.25], [0.97, 1.5]]))
    single = [line.get_data() for line in axes.lines if line.get_label() == "single-task networks"]
    assert [single[0][0], single[1][1]] == [[0.99, 0.99], [1.2, 1.2]]
    assert legend(figure) == ["1  famo", "2  uw + pcgrad", "single-task networks"]
    assert {text.get_text() for text in axes.texts} == {"1", "2"}


def test_pareto_refuses_an_unknown_metric():
    with pytest.raises(ValueError, match=r"Unknown metric 'sum/mea'. Did you mean 'sum/mae'\? Known: left/accuracy, sum/mae."):
        pareto(two_rows(), "left/accuracy", "sum/mea")


def test_points_that_cannot_be_shown_are_in_the_legend():
    values = ((1.0, 1.0), (1.1, 1.2), (1.2, 1.1), (1.3, NAN), (1.3, 99.0))
    rows = [row(f"m{k}", seeds=1, metrics={"a/b": estimate(x), "c/d": estimate(y)}) for k, (x, y) in enumerate(values)]
    figure = pareto(comparison(*rows, baselines=None), "a/b", "c/d")
    assert legend(figure) == ["1  m0", "2  m1", "3  m2", "4  m3: no value", "5  m4: outside, at (1.3, 99)"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"1", "2", "3"}


def test_numbers_of_points_do_not_overlap():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.01, (20, 2)) ** 3  # a crowd
    rows = [row(f"m{k}", seeds=1, metrics={"a/b": estimate(x), "c/d": estimate(y)}) for k, (x, y) in enumerate(values)]
    assert_no_overlap(pareto(comparison(*rows), "a/b", "c/d"))


def test_most_opposed_metrics():
    ranks = {"a/x": (1, 2, 3), "b/x": (1, 3, 2), "c/x": (-1, -2, -3)}  # of c, more is better
    rows = [row(f"m{k}", seeds=1, metrics={name: estimate(of[k]) for name, of in ranks.items()}) for k in range(3)]
    assert most_opposed(comparison(*rows, higher=("c/x",))) == ("a/x", "b/x")
    assert most_opposed(comparison(*rows, higher=())) == ("a/x", "c/x")
    assert most_opposed(comparison(*rows, metrics=("a/x",))) is None


def test_cost():
    figure = cost(two_rows())
    (axes,) = figure.axes
    drawn = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() not in ("None", "")}
    assert drawn == {(1.0, 4.0), (2.25, 6.0)}
    assert (axes.get_xscale(), axes.get_ylabel()) == ("linear", "delta_m in %, lower is better ←")
    of = realistic(baselines=False)
    figure = cost(replace(of, rows=(replace(of.rows[0], time=30.0), *of.rows[1:])))
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()) == ("log", "mean rank, lower is better ←")
    assert "single-task networks" not in words(figure)
    assert cost(replace(of, rows=tuple(replace(line, time=NAN) for line in of.rows))) is None
