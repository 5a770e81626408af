import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text

from experiments.analysis.figures import figures
from experiments.analysis.figures.drawing import POINTS, looks, thinned
from tests.made_up import TASKS, comparison, curves, estimate, realistic, row, two_rows

NAN = math.nan
FORTY = tuple(f"task_{k}" for k in range(40))
ODD = ("$a$_<&%", "_b")


def words(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(axes):
    """Curves by colour and style."""
    return {(line.get_color(), line.get_linestyle()): line.get_data() for line in axes.lines}


def test_delta_m_draws_means_and_intervals():
    of = two_rows()
    figure = figures.delta_m(of)
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
    figure = figures.delta_m(comparison(row(seeds=1, delta_m=estimate(5.0)), metrics=("a/b",)))
    assert not figure.axes[0].containers[0][2]
    assert figure.axes[0].containers[0][0].get_xydata().tolist() == [[5.0, 0.0]]


def test_delta_m_says_what_it_does_not_draw():
    drops = (estimate(3.0, 4.0), estimate(5.0, 5.0), estimate(6.0, 6.5), estimate(900.0, 1100.0), estimate(1.0, NAN))
    rows = [row(f"m{k}", seeds=2, delta_m=drop) for k, drop in enumerate(drops)]
    figure = figures.delta_m(comparison(*rows, metrics=("a/b",)))
    assert len(figure.axes[0].containers) == 3
    assert "1e+03 →" in words(figure)
    assert "not finite" in words(figure)
    assert "m4   5" in words(figure)
    assert figure.axes[0].get_xlim()[1] < 20


def test_pareto_front():
    points = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.5, 3.0), "d": (4.0, 1.0), "e": (5.0, 2.0), "f": (2.0, 3.0)}
    assert figures.pareto_front(points, (1, 1)) == ["a", "b", "f", "d"]
    assert figures.pareto_front(points, (-1, -1)) == ["e", "c", "a"]
    assert figures.pareto_front(points, (-1, 1)) == ["e", "d"]


def test_pareto_draws_means_errors_front_and_baselines():
    of = two_rows()
    figure = figures.pareto(of, "left/accuracy", "sum/mae")
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


def test_pareto_names_the_metrics_there_are():
    with pytest.raises(ValueError, match=r"Unknown metric 'sum/mea'. Did you mean 'sum/mae'\? Known: left/accuracy, sum/mae."):
        figures.pareto(two_rows(), "left/accuracy", "sum/mea")


def test_points_that_cannot_be_shown_are_in_the_legend():
    values = ((1.0, 1.0), (1.1, 1.2), (1.2, 1.1), (1.3, NAN), (1.3, 99.0))
    rows = [row(f"m{k}", seeds=1, metrics={"a/b": estimate(x), "c/d": estimate(y)}) for k, (x, y) in enumerate(values)]
    figure = figures.pareto(comparison(*rows, baselines=None), "a/b", "c/d")
    assert legend(figure) == ["1  m0", "2  m1", "3  m2", "4  m3: no value", "5  m4: outside, at (1.3, 99)"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"1", "2", "3"}


def test_numbers_of_points_do_not_overlap():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.01, (20, 2)) ** 3  # a crowd
    rows = [row(f"m{k}", seeds=1, metrics={"a/b": estimate(x), "c/d": estimate(y)}) for k, (x, y) in enumerate(values)]
    assert_no_overlap(figures.pareto(comparison(*rows), "a/b", "c/d"))


def test_most_opposed_metrics():
    ranks = {"a/x": (1, 2, 3), "b/x": (1, 3, 2), "c/x": (-1, -2, -3)}  # of c, more is better
    rows = [row(f"m{k}", seeds=1, metrics={name: estimate(of[k]) for name, of in ranks.items()}) for k in range(3)]
    assert figures.most_opposed(comparison(*rows, higher=("c/x",))) == ("a/x", "b/x")
    assert figures.most_opposed(comparison(*rows, higher=())) == ("a/x", "c/x")
    assert figures.most_opposed(comparison(*rows, metrics=("a/x",))) is None


def test_cost():
    figure = figures.cost(two_rows())
    (axes,) = figure.axes
    drawn = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() not in ("None", "")}
    assert drawn == {(1.0, 4.0), (2.25, 6.0)}
    assert (axes.get_xscale(), axes.get_ylabel()) == ("linear", "delta_m in %, lower is better ←")
    of = realistic(baselines=False)
    figure = figures.cost(replace(of, rows=(replace(of.rows[0], time=30.0), *of.rows[1:])))
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()) == ("log", "mean rank, lower is better ←")
    assert "single-task networks" not in words(figure)
    assert figures.cost(replace(of, rows=tuple(replace(line, time=NAN) for line in of.rows))) is None


def test_curves_draw_what_was_logged():
    of = realistic()
    logged = curves(of, points=POINTS)
    figure = figures.curves(of, logged)
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
            assert drawn.get_color() == looks(of.rows)[line.label].color
    assert figure.axes[0].get_yscale() == "log"
    assert legend(figure) == [f"{k}  {line.label}" for k, line in enumerate(of.rows, start=1)]


def test_colour_is_the_loss_balancer_and_style_the_gradient_balancer():
    found = looks(realistic().rows)
    assert len({found[label].color for label in ("ls", "uw", "famo", "go4align", "scaleinvls + mgda")}) == 5
    assert found["uw"].color == found["uw + pcgrad"].color == found["uw + nashmtl"].color
    assert found["uw + pcgrad"].dash == found["ls + pcgrad"].dash != found["ls"].dash == (0, ())
    settings = looks([row("go4align loss.num_groups=2"), row("go4align loss.num_groups=3")])
    assert len({look.color for look in settings.values()}) == 2


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
    figure = figures.curves(of, logged)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_yscale() == "linear"
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True, False]
    assert figure.axes[1].lines[0].get_marker() == "."  # a single point


def test_of_forty_tasks_six_are_drawn():
    of = realistic(tasks=FORTY)
    figure = figures.curves(of, curves(of, FORTY, points=5))
    assert len(figure.axes) == 6 * 3
    assert figure.get_suptitle() == "The first 6 of 40 tasks"
    assert figure.get_figwidth() == figures.WIDTH


def test_conflict_rate_and_cosines():
    of = realistic()
    logged = curves(of, points=POINTS)
    figure = figures.conflicts(of, logged)
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


def test_of_many_pairs_those_in_conflict_are_drawn():
    of = realistic(tasks=FORTY)
    logged = curves(of, FORTY, points=5)
    figure = figures.conflicts(of, logged)
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


def test_cosines_that_were_not_logged():
    of = comparison(row("ls + pcgrad"), row("ls + mgda"), metrics=("a/x", "b/x", "c/x"))
    steps = np.arange(3.0)
    logged = {"ls + pcgrad": {"cosine/a__b": (steps, steps - 1), "cosine/a__c": (steps, np.full(3, NAN))}}
    figure = figures.conflicts(of, logged)
    assert "No cosines were logged: ls + mgda." in words(figure)
    image = figure.axes[1].images[0].get_array().filled(NAN)
    assert image[0].tolist() == [-1, 0, 1]
    assert np.isnan(image[1]).all()


def test_thinning_keeps_means():
    steps = np.arange(1000.0)
    thin_steps, values = thinned(steps, 2 * steps)
    assert len(values) == len(thin_steps) == POINTS
    assert values == pytest.approx(2 * thin_steps)
    gaps = np.where(steps % 2 == 0, 1.0, NAN)
    gaps[:100] = NAN
    _, values = thinned(steps, gaps)
    assert np.isnan(values[:6]).all()
    assert (values[7:] == 1).all()


def test_nothing_to_show_is_none():
    bare = comparison(row(metrics={"a/b": estimate(NAN)}, delta_m=estimate(NAN), time=NAN), baselines=None)
    assert figures.every_figure(bare) == {}
    assert figures.pareto(bare, "a/b", "a/b") is None
    assert figures.conflicts(bare, {"ls": {"conflicts": (np.arange(3.0), np.zeros(3))}}) is None  # one task has no pairs


@pytest.mark.parametrize(
    ("made", "tasks", "names"),
    [
        (realistic, TASKS, ["delta_m", "pareto", "cost", "curves", "conflicts"]),
        (lambda: realistic(pairs=[("ls", None)], seeds=1, baselines=False), TASKS, ["pareto", "cost", "curves"]),
        (lambda: realistic(pairs=[("a_$<&%", "_$b$")], tasks=ODD), ODD, ["delta_m", "pareto", "cost", "curves", "conflicts"]),
    ],
)
def test_every_figure_is_readable(made, tasks, names):
    of = made()
    drawn = figures.every_figure(of, curves(of, tasks))
    assert list(drawn) == names
    assert set(names) <= set(figures.CAPTIONS)
    for figure in drawn.values():
        assert_no_overlap(figure)


def assert_no_overlap(figure):
    """No two texts cover each other, all are on the page, and none is smaller than 8 pt."""
    figure.draw_without_rendering()
    ticks, shown = set(), []
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {tick.label1, tick.label2}
                if tick.label1.get_visible() and min(low, high) <= tick.get_loc() <= max(low, high):
                    shown.append(tick.label1)
    shown += [text for text in figure.findobj(Text) if text.get_visible() and text not in ticks]
    boxes = {text: Text.get_window_extent(text) for text in shown if text.get_text().strip()}
    assert all(text.get_fontsize() >= 8 for text in boxes)
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.padded(-1.5).overlaps(other.padded(-1.5)), (a, b)


def test_figures_are_saved_for_a_paper(tmp_path):
    drawn = {"delta_m": figures.delta_m(two_rows())}
    files = figures.save(drawn, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["delta_m.pdf", "delta_m.png"]
    assert files[0].read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in files[0].read_bytes()
    assert files[1].read_bytes().startswith(b"\x89PNG")
    first = files[0].read_bytes()
    assert figures.save(drawn, tmp_path / "new" / "folder")[0].read_bytes() == first
