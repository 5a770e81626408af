import math

import pytest

from balance.comparison.figures.delta_m import delta_m
from tests.comparison.figures.reading import legend, words
from tests.comparison.synthetic import comparison, estimate, row, two_rows

NAN = math.nan


def test_delta_m_draws_means_and_intervals():
    of = two_rows()
    figure = delta_m(of)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["famo   1", "uw + pcgrad   2"]
    assert axes.yaxis_inverted()  # the first row is on top
    for y, (line, drawn) in enumerate(zip(of.rows, axes.containers, strict=True)):
        assert drawn[0].get_xydata().tolist() == [[line.delta_m.mean, y]]
        ends = drawn[2][0].get_segments()[0]
        assert ends[:, 0] == pytest.approx(line.delta_m.interval)
        assert ends[:, 1].tolist() == [y, y]
    left, right = axes.get_xlim()
    assert left < 0
    assert right > 6
    assert "single-task networks" in words(figure)
    assert legend(figure) == ["best", "not distinguishable from the best"]


def test_delta_m_of_one_seed_has_no_interval():
    figure = delta_m(comparison(row(seeds=1, delta_m=estimate(5.0)), metrics=("a/b",)))
    assert not figure.axes[0].containers[0][2]
    assert figure.axes[0].containers[0][0].get_xydata().tolist() == [[5.0, 0.0]]


def test_delta_m_writes_means_that_it_does_not_draw():
    drops = (estimate(3.0, 4.0), estimate(5.0, 5.0), estimate(6.0, 6.5), estimate(900.0, 1100.0), estimate(1.0, NAN))
    rows = [row(f"m{k}", seeds=2, delta_m=drop) for k, drop in enumerate(drops)]
    figure = delta_m(comparison(*rows, metrics=("a/b",)))
    assert len(figure.axes[0].containers) == 3
    assert "1e+03 →" in words(figure)
    assert "not finite" in words(figure)
    assert "m4   5" in words(figure)
    assert figure.axes[0].get_xlim()[1] < 20
