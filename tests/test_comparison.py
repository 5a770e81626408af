"""Statistics of comparisons, on made-up runs with known answers."""

import math

import numpy as np
import pytest

from experiments.analysis.comparison import ENOUGH_SEEDS, Estimate, Run, common_settings, compare, single_task_means, versus

SETTINGS = {"train.lr": "0.1", "data.seed": "0", "balancer.scale": "paper"}


def run(
    loss="ls", gradient=None, seed=0, *, error=1.0, accuracy=0.5, settings=None, finished=True, step_ms=math.nan, run_id=""
):
    metrics = {"a/error": error, "b/accuracy": accuracy} if finished else {}
    return Run(
        run_id or f"{loss}-{gradient}-{seed}", loss, gradient, seed, SETTINGS | (settings or {}), metrics, finished, step_ms
    )


def table(runs, baselines=None):
    return compare(runs, experiment="made_up", higher_is_better={"b/accuracy"}, baselines=baselines)


def row(comparison, label):
    (found,) = [row for row in comparison.rows if row.label == label]
    return found


# --- means, errors, intervals -----------------------------------------------------------------------------------------


def test_mean_error_and_interval_by_hand():
    """Of 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7; Student's t with two degrees of freedom reaches 4.302653."""
    estimate = Estimate({0: 1.0, 1: 2.0, 2: 6.0})
    assert estimate.mean == 3
    assert estimate.error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.interval == pytest.approx((3 - 4.302653 * math.sqrt(7 / 3), 3 + 4.302653 * math.sqrt(7 / 3)), rel=1e-6)


def test_one_seed_has_no_error_and_no_interval():
    estimate = Estimate({4: 2.5})
    assert estimate.mean == 2.5
    assert math.isnan(estimate.error)
    assert all(map(math.isnan, estimate.interval))


def test_nan_in_one_seed_is_not_left_out():
    estimate = Estimate({0: 1.0, 1: math.nan})
    assert math.isnan(estimate.mean)
    assert all(map(math.isnan, estimate.interval))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(5, 2, size=(2000, 3))
    intervals = [Estimate(dict(enumerate(sample))).interval for sample in samples.tolist()]
    assert np.mean([low <= 5 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


# --- against the best -------------------------------------------------------------------------------------------------


def values(*numbers):
    return dict(enumerate(numbers))


@pytest.mark.parametrize(
    ("numbers", "best", "larger", "verdict"),
    [
        (values(2, 3, 4, 5, 6, 7), values(1, 2, 3, 4, 5, 6), False, "worse"),  # always 1 more
        (values(2, 3, 4, 5, 6, 7), values(1, 2, 3, 4, 5, 6), True, "alike"),  # which is better where large is good
        (values(2, 1, 4, 3, 6, 5), values(1, 2, 3, 4, 5, 6), False, "alike"),  # mean difference 0
        (values(1, 2, 3, 4, 5, 6), values(1, 2, 3, 4, 5, 6), False, "alike"),  # a tie
        (values(2, 3, 4), values(1, 2, 3), False, "unclear"),  # one sign in 1 of 4 cases by chance
        (values(2, 1, 4), values(1, 2, 3), False, "alike"),
        (values(2), values(1), False, "unclear"),
        ({0: 2.0, 1: 3.0}, {7: 1.0, 8: 1.0}, False, "unclear"),  # no seed in common
        (values(math.nan, 1, 1, 1, 1, 1), values(1, 1, 1, 1, 1, 1), False, "worse"),
    ],
)
def test_verdicts_by_hand(numbers, best, larger, verdict):
    assert versus(numbers, best, higher_is_better=larger) == verdict


def test_pairing_finds_a_small_difference_between_seeds_that_differ_much():
    luck = [0, 100, -50, 30, 10, -80]
    assert versus(values(*(x + 1 + 0.01 * k for k, x in enumerate(luck))), values(*luck), higher_is_better=False) == "worse"
    shuffled = dict(zip([3, 1, 4, 0, 5, 2], (x + 1 for x in luck), strict=True))
    assert versus(shuffled, values(*luck), higher_is_better=False) == "alike"


def test_equal_methods_are_seldom_called_worse():
    rng = np.random.default_rng(1)
    worse = [
        versus(values(*rng.normal(size=ENOUGH_SEEDS)), values(*rng.normal(size=ENOUGH_SEEDS)), higher_is_better=False)
        == "worse"
        for _ in range(200)
    ]
    assert np.mean(worse) < 0.12  # a percentile bootstrap of six pairs errs somewhat more often than its 2.5 % on this side


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    """delta_m against error 2 and accuracy 0.8: ls (50 + 25) / 2, uw (0 + 0) / 2; uw is first on both metrics."""
    runs = [run(error=3.0, accuracy=0.6, seed=s, step_ms=2.0) for s in (0, 1)]
    runs += [run("uw", "pcgrad", error=2.0, accuracy=0.8, seed=s, step_ms=6.0) for s in (0, 1)]
    made = table(runs, {"a/error": 2.0, "b/accuracy": 0.8})
    assert [row.label for row in made.rows] == ["uw + pcgrad", "ls"]
    best, plain = made.rows
    assert (best.delta_m.mean, plain.delta_m.mean) == pytest.approx((0, 37.5))
    assert (best.mean_rank, plain.mean_rank) == (1, 2)
    assert (best.time, plain.time) == (3, 1)
    assert best.seeds == plain.seeds == (0, 1)
    assert {estimate.verdict for estimate in (best.delta_m, *best.metrics.values())} == {"best"}
    assert plain.delta_m.verdict == "unclear"
    assert any("too few" in note for note in made.notes)


def test_ties_share_the_best_and_the_rank():
    made = table([run(loss, seed=s) for loss in ("ls", "uw", "rlw") for s in (0, 1)] + [run("dwa", error=2.0, seed=0)])
    assert {row.label: row.mean_rank for row in made.rows} == {"ls": 1, "uw": 1, "rlw": 1, "dwa": (4 + 1) / 2}
    assert [row.metrics["a/error"].verdict for row in made.rows[:3]] == ["best"] * 3
    assert made.rows[0].delta_m is None


def test_missing_seeds_are_told_and_pairs_use_the_common_ones():
    made = table([*(run(seed=s, error=1.0 + s) for s in range(8)), *(run("uw", seed=s, error=2.0 + s) for s in range(1, 8))])
    other = row(made, "uw")
    assert other.seeds == tuple(range(1, 8))
    assert other.metrics["a/error"].verdict == "worse"
    assert "uw lacks seed 0." in made.notes


def test_a_failed_run_counts_but_not_in_the_means():
    made = table([run(seed=0), run(seed=1), run("uw", seed=0), run("uw", seed=1, finished=False), run("rlw", finished=False)])
    assert row(made, "uw").failed == 1
    assert row(made, "uw").seeds == (0,)
    assert "uw lacks seed 1 (1 failed)." in made.notes
    assert "No run of rlw finished." in made.notes
    assert {row.label for row in made.rows} == {"ls", "uw"}


def test_a_run_that_was_repeated_after_a_failure_is_no_failure():
    assert row(table([run(seed=0), run(seed=0, finished=False)]), "ls").failed == 0


def test_the_newest_of_equal_runs_counts():
    made = table([run(error=1.0, run_id="new"), run(error=9.0, run_id="old")])
    assert row(made, "ls").metrics["a/error"].values == {0: 1.0}


def test_nan_metrics_rank_last_and_are_told():
    made = table([run(error=math.nan), run("uw", error=5.0)], {"a/error": 1.0, "b/accuracy": 0.5})
    assert [row.label for row in made.rows] == ["uw", "ls"]
    assert math.isnan(row(made, "ls").delta_m.mean)
    assert row(made, "uw").metrics["a/error"].verdict == "best"
    assert (row(made, "ls").mean_rank, row(made, "uw").mean_rank) == (1.5, 1)
    assert any("ls has NaN for a/error" in note for note in made.notes)


def test_a_metric_that_only_some_runs_have_is_nan_for_the_others():
    odd = run("uw")
    made = table([run(), Run("x", "uw", None, 0, odd.settings, {"a/error": 1.0})])
    assert math.isnan(row(made, "uw").metrics["b/accuracy"].mean)


def test_one_seed_is_told():
    made = table([run(), run("uw")])
    assert any("One seed is too few" in note for note in made.notes)


@pytest.mark.parametrize(
    ("baselines", "message"),
    [({"a/error": 0.0, "b/accuracy": 1.0}, "'a/error' that is not zero"), ({"a/error": 1.0}, "baseline of 'b/accuracy'")],
)
def test_a_baseline_that_is_zero_or_missing_is_named(baselines, message):
    with pytest.raises(ValueError, match=message):
        table([run()], baselines)


def test_no_finished_run_is_an_error():
    with pytest.raises(ValueError, match="no finished runs"):
        table([run(finished=False)])


def test_settings_make_rows_where_they_differ():
    slow, fast = run(settings={"train.lr": "0.01"}), run()
    assert {row.label for row in table([slow, fast]).rows} == {"ls train.lr=0.01", "ls train.lr=0.1"}
    grouped = [run("go4align", settings={"loss.num_groups": k}) for k in ("2", "3")]
    assert {row.label for row in table([run(), *grouped]).rows} == {
        "ls",
        "go4align loss.num_groups=2",
        "go4align loss.num_groups=3",
    }


def test_runs_on_different_data_are_not_compared():
    with pytest.raises(ValueError, match=r"data\.seed=1 and data\.seed=0"):
        table([run(), run("uw", settings={"data.seed": "1"})])


# --- single-task networks ---------------------------------------------------------------------------------------------


def alone(task, seed, settings=None, **metrics):
    return run("stl", seed=seed, settings={"loss.main_task": str(task)} | (settings or {}), **metrics)


def test_each_metric_is_of_the_network_of_its_task():
    runs = [alone(0, 0, error=1.0, accuracy=0.1), alone(0, 1, error=3.0, accuracy=0.1), alone(1, 0, error=9.0, accuracy=0.7)]
    common = runs[0].common
    assert single_task_means(runs, common, ("a", "b")) == {"a/error": 2.0, "b/accuracy": 0.7}
    assert single_task_means(runs[:2], common, ("a", "b")) == {}
    assert single_task_means(runs, (("train.lr", "other"),), ("a", "b")) == {}


def test_the_settings_of_most_runs_come_first():
    slow = {"train.lr": "0.01"}
    assert common_settings([run(settings=slow), run(seed=1), run(seed=2)])[0] == run().common
    assert ("balancer.scale", "paper") not in run().common
