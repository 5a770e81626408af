import pytest

from balance.metrics import delta_m


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
