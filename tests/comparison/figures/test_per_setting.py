import numpy as np
import pytest

from balance.comparison.figures.per_setting import metrics_per_setting
from tests.comparison.figures.reading import assert_no_overlap, legend, words
from tests.comparison.synthetic import comparison, estimate, row

STEPS = np.array([10.0, 20.0, 30.0])


def accuracies(*rows, baselines=None):
    rows = [row(label, seeds=2, metrics={name: estimate(*values) for name, values in of.items()}) for label, of in rows]
    return comparison(*rows, baselines=baselines)


def logged(*comparisons):
    """Validation accuracies of 0.5 + 0.1 x seed, rising by 0.1 from epoch to epoch."""
    names = {name for compared in comparisons for name in compared.metrics}
    runs = {run.run_id: run.seed for compared in comparisons for line in compared.rows for run in line.runs}
    return {
        run_id: {f"val/{name}": (STEPS, 0.5 + 0.1 * seed + np.array([0, 0.1, 0.2])) for name in names}
        for run_id, seed in runs.items()
    }


@pytest.fixture
def two():
    baselines = {"left/accuracy": 0.9, "right/accuracy": 0.95}
    balanced = accuracies(
        ("ls", {"left/accuracy": (0.8, 0.9), "right/accuracy": (0.9, 1.0)}),
        ("uw + pcgrad", {"left/accuracy": (0.7, 0.8), "right/accuracy": (0.6, 0.7)}),
        baselines=baselines,
    )
    imbalanced = accuracies(("ls", {"left/accuracy": (0.3, 0.4), "right/accuracy": (0.9, 0.9)}), baselines=baselines)
    return {"1.0": balanced, "1000.0": imbalanced}


def test_panels_are_values_of_the_setting_times_metrics(two):
    figure = metrics_per_setting("data.imbalance", two, logged(*two.values()))
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "left\nimbalance=1",
        "right\nimbalance=1",
        "left\nimbalance=1000",
        "right\nimbalance=1000",
    ]
    assert legend(figure) == ["1  ls", "2  uw + pcgrad"]
    assert figure.axes[0].get_ylabel() == "validation error (%)"
    assert {axes.get_xscale() for axes in figure.axes[4:]} == {"log"}
    assert len({axes.get_xlim() for axes in figure.axes[4:]}) == 1


def test_errors_over_training_and_on_the_test_data(two):
    figure = metrics_per_setting("data.imbalance", two, logged(*two.values()))
    upper, lower = figure.axes[0], figure.axes[4]
    assert upper.lines[0].get_xdata().tolist() == STEPS.tolist()
    assert upper.lines[0].get_ydata() == pytest.approx([45, 35, 25])  # the mean of 50 and 40 %, and so on
    assert upper.lines[-1].get_ydata() == pytest.approx([10, 10])  # the single-task network
    dots, mean, *_ = lower.lines
    assert dots.get_xdata() == pytest.approx([20, 10])
    assert mean.get_xdata() == pytest.approx([15])
    assert figure.axes[5].lines[0].get_xdata() == pytest.approx([10, 0.01])  # no error is drawn as 0.01 %
    assert [label.get_text() for label in lower.get_yticklabels()] == ["ls", "uw + pcgrad"]
    assert len(figure.axes[6].lines) == 2 + 1  # one row has no runs with this value


def test_other_metrics_are_drawn_as_they_are():
    compared = accuracies(("ls", {"sum/mae": (1.0, 2.0), "left/accuracy": (0.5, 0.6)}))
    figure = metrics_per_setting("seed", {"a": compared}, {})
    assert "test mae" in words(figure)
    assert "validation mae" in words(figure)
    assert figure.axes[2].lines[0].get_xdata().tolist() == [1, 2]
    assert (figure.axes[0].get_yscale(), figure.axes[1].get_yscale()) == ("linear", "log")
    assert len(figure.axes[0].lines) == 0


def test_of_many_metrics_the_first_are_drawn():
    compared = accuracies(("ls", {f"{task}/mae": (1.0, 2.0) for task in "abcdefgh"}))
    assert len(metrics_per_setting("x", {"1": compared, "2": compared}, {}).axes) == 2 * 2 * 3


def test_figure_is_readable(two):
    assert_no_overlap(metrics_per_setting("data.imbalance", two, logged(*two.values())))
