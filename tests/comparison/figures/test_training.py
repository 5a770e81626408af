import math
from itertools import combinations

import numpy as np
import pytest

from balance.comparison.figures import training
from balance.comparison.figures.drawing import POINTS, WIDTH, row_styles
from tests.comparison.figures.reading import legend, words
from tests.comparison.synthetic import TASKS, comparison, curves, realistic, row

NAN = math.nan
FORTY = tuple(f"task_{k}" for k in range(40))


def test_curves_draw_logged_series():
    of = realistic()
    logged = curves(of, points=POINTS)
    figure = training.curves(of, logged)
    assert len(figure.axes) == 3 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == list(TASKS)
    assert [figure.axes[k].get_ylabel() for k in (0, 4, 8)] == ["loss", "loss weight", "gradient weight"]
    balanced = [line for line in of.rows if line.gradient_method]
    for axes, group, rows in zip(
        figure.axes[::4], ("loss", "weight", "gradient_weight"), (of.rows, of.rows, balanced), strict=True
    ):
        assert len(axes.lines) == len(rows)
        for drawn, line in zip(axes.lines, rows, strict=True):
            steps, values = logged[line.label][f"{group}/left"]
            assert (drawn.get_xdata() == steps).all()
            assert (drawn.get_ydata() == values).all()
            assert drawn.get_color() == row_styles(of.rows)[line.label].color
    assert figure.axes[0].get_yscale() == "log"
    assert legend(figure) == [f"{k}  {line.label}" for k, line in enumerate(of.rows, start=1)]


def test_curves_of_losses_below_zero_and_gaps():
    of = comparison(row(), metrics=("a/b",))
    steps = np.arange(4.0)
    logged = {
        "ls": {
            "loss/a": (steps, np.array([1.0, NAN, math.inf, -100.0])),
            "loss/b": (steps[:1], np.ones(1)),
            "loss/c": (steps[:0], steps[:0]),
        }
    }
    figure = training.curves(of, logged)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_yscale() == "linear"
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True, False]
    assert figure.axes[1].lines[0].get_marker() == "."  # a single point


def test_curves_draw_six_of_forty_tasks():
    of = realistic(tasks=FORTY)
    figure = training.curves(of, curves(of, FORTY, points=5))
    assert len(figure.axes) == 6 * 3
    assert figure.get_suptitle() == "The first 6 of 40 tasks"
    assert figure.get_figwidth() == WIDTH


def test_conflict_rate_and_cosines():
    of = realistic()
    logged = curves(of, points=POINTS)
    figure = training.conflicts(of, logged)
    rate, *maps, bar = figure.axes
    balanced = [line.label for line in of.rows if line.gradient_method]
    assert len(balanced) == len(maps) == len(rate.lines) == 9
    for label, line, panel in zip(balanced, rate.lines, maps, strict=True):
        assert line.get_ydata() == pytest.approx(logged[label]["conflicts"][1] / 6)
        (image,) = panel.images
        assert image.get_clim() == (-1, 1)
        pairs = [f"cosine/{a}__{b}" for a, b in combinations(TASKS, 2)]
        assert np.asarray(image.get_array()) == pytest.approx(np.array([logged[label][pair][1] for pair in pairs]))
    assert [label.get_text() for label in maps[0].get_yticklabels()][:2] == ["left, right", "left, sum"]
    assert "Not measured without a gradient balancer: go4align, famo, uw, ls." in words(figure)
    assert bar.get_xlim() == (-1, 1)


def test_conflicts_draw_the_lowest_of_many_pairs():
    of = realistic(tasks=FORTY)
    logged = curves(of, FORTY, points=5)
    figure = training.conflicts(of, logged)
    maps = figure.axes[1:-1]
    assert len(maps) == 6
    assert {panel.images[0].get_array().shape for panel in maps} == {(30, 5)}
    assert "The 30 of 780 pairs with the lowest mean cosine." in words(figure)
    assert "The first 6 of 9 methods that have cosines." in words(figure)
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(logged["scaleinvls + mgda"]["conflicts"][1] / 780)
    means = {
        (a, b): np.mean([logged[line.label][f"cosine/{a}__{b}"][1] for line in of.rows if line.gradient_method])
        for a, b in combinations(FORTY, 2)
    }
    a, b = min(means, key=means.get)
    assert maps[0].get_yticklabels()[0].get_text() == f"{a}, {b}"


def test_conflicts_list_rows_without_cosines():
    of = comparison(row("ls + pcgrad"), row("ls + mgda"), metrics=("a/x", "b/x", "c/x"))
    steps = np.arange(3.0)
    logged = {"ls + pcgrad": {"cosine/a__b": (steps, steps - 1), "cosine/a__c": (steps, np.full(3, NAN))}}
    figure = training.conflicts(of, logged)
    assert "No cosines were logged: ls + mgda." in words(figure)
    image = figure.axes[1].images[0].get_array().filled(NAN)
    assert image[0].tolist() == [-1, 0, 1]
    assert np.isnan(image[1]).all()


def test_validation_metrics_have_a_panel_each():
    of = realistic()
    logged = curves(of, points=30)
    figure = training.validation(of, logged)
    assert [axes.get_title() for axes in figure.axes] == [f"{task}/error ↓" for task in TASKS]
    for axes, task in zip(figure.axes, TASKS, strict=True):
        assert len(axes.lines) == len(of.rows)
        for drawn, line in zip(axes.lines, of.rows, strict=True):
            assert (drawn.get_ydata() == logged[line.label][f"val/{task}/error"][1]).all()
    assert legend(figure) == [f"{k}  {line.label}" for k, line in enumerate(of.rows, start=1)]
    assert training.validation(of, {"ls": {"loss/a": (np.arange(2.0), np.ones(2))}}) is None


def test_validation_draws_nine_of_forty_metrics():
    of = realistic(tasks=FORTY)
    figure = training.validation(of, curves(of, FORTY, points=5))
    assert len(figure.axes) == 9
    assert figure.get_suptitle() == "The first 9 of 40 metrics"
