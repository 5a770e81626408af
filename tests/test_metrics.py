import math

import pytest

from balance.metrics import delta_m, mean_rank


def test_delta_m():
    """By hand: accuracy 10 % worse, error 20 % better, error 40 % worse."""
    metrics = {"a/accuracy": 0.81, "b/error": 4.0, "c/error": 1.4}
    baselines = {"a/accuracy": 0.9, "b/error": 5.0, "c/error": 1.0, "d/unused": 0.0}
    assert delta_m(metrics, baselines, {"a/accuracy"}) == pytest.approx((10 - 20 + 40) / 3)
    assert delta_m(baselines | metrics | {"d/unused": 1.0}, baselines | {"d/unused": 1.0}, {"a/accuracy"}) == pytest.approx(
        30 / 4
    )


@pytest.mark.parametrize(
    ("metrics", "baselines", "message"),
    [({}, {}, "at least one"), ({"a": 1.0}, {}, "baseline of 'a'"), ({"a": 1.0}, {"a": 0.0}, "not zero")],
)
def test_mistakes(metrics, baselines, message):
    with pytest.raises(ValueError, match=message):
        delta_m(metrics, baselines, set())


NYUV2 = """
LS        39.29 65.33 0.5493 0.2263 28.15 23.96 22.09 47.50 61.08   8.89
SI        38.45 64.27 0.5354 0.2201 27.60 23.37 22.53 48.57 62.32   7.89
RLW       37.17 63.77 0.5759 0.2410 28.27 24.18 22.26 47.05 60.62  11.22
DWA       39.11 65.31 0.5510 0.2285 27.61 23.18 24.17 50.18 62.39   7.67
UW        36.87 63.17 0.5446 0.2260 27.04 22.61 23.54 49.05 63.65   7.44
MGDA      30.47 59.90 0.6070 0.2555 24.88 19.45 29.18 56.88 69.36   6.00
PCGrad    38.06 64.64 0.5550 0.2325 27.41 22.80 23.86 49.83 63.14   8.00
GradDrop  39.39 65.12 0.5455 0.2279 27.48 22.96 23.38 49.44 62.87   7.00
CAGrad    39.79 65.49 0.5486 0.2250 26.31 21.58 25.61 52.36 65.58   4.56
IMTL-G    39.35 65.60 0.5426 0.2256 26.02 21.19 26.20 53.13 66.24   3.78
Nash-MTL  40.13 65.93 0.5261 0.2171 25.26 20.08 28.40 55.47 68.15   2.11
FAMO      38.88 64.90 0.5474 0.2194 25.06 19.57 29.21 56.61 68.98   3.44
"""  # Table 1 of the FAMO paper: mIoU, pixel accuracy, two depth errors, two angles, three shares of angles; mean rank


def test_mean_rank_reproduces_a_published_table():
    rows = [line.split() for line in NYUV2.strip().splitlines()]
    names = ("miou", "accuracy", "abs", "rel", "mean", "median", "11", "22", "30")
    table = {method: dict(zip(names, map(float, numbers), strict=True)) for method, *numbers, _ in rows}
    ranks = mean_rank(table, {"miou", "accuracy", "11", "22", "30"})
    assert {method: round(rank, 2) for method, rank in ranks.items()} == {row[0]: float(row[-1]) for row in rows}


def test_methods_that_tie_share_the_best_rank_and_the_next_is_skipped():
    assert mean_rank({"a": {"x": 1.0}, "b": {"x": 1.0}, "c": {"x": 2.0}}) == {"a": 1, "b": 1, "c": 3}


def test_rank_of_nan_is_the_last():
    table = {
        "a": {"x": math.nan, "y": 1.0},
        "b": {"x": 5.0, "y": 2.0},
        "c": {"x": 6.0, "y": 3.0},
        "d": {"x": math.nan, "y": 4.0},
    }
    assert mean_rank(table, {"y"}) == {"a": (3 + 4) / 2, "b": (1 + 3) / 2, "c": (2 + 2) / 2, "d": (3 + 1) / 2}


@pytest.mark.parametrize("table", [{}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}])
def test_mean_rank_needs_the_same_metrics_of_all(table):
    with pytest.raises(ValueError, match="mean_rank needs"):
        mean_rank(table)
