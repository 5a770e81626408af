import math
from dataclasses import replace

import pytest

from balance.comparison.recorded_run import RecordedRun
from balance.comparison.run_table import main_summary, tabulate
from balance.comparison.tables import cells
from tests.comparison.recorded import run


def table(runs, baselines=None):
    return tabulate(runs, experiment="synthetic", higher_is_better={"b/accuracy"}, baselines=baselines)


def row(comparison, label):
    (found,) = [row for row in comparison.rows if row.label == label]
    return found


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


def of_all_tasks(method, success, *, seed=0, error=1.0):
    metrics = {"a/error": error, "all/last": success, "all/other": success, "b/accuracy": 0.5}
    return replace(run(method, seed=seed), metrics=metrics)


def test_results_of_all_tasks_come_first_and_have_no_rank():
    """uw is first on the only metric of a task that differs, and ls on all tasks together."""
    runs = [of_all_tasks("uw", 0.25, error=1.0), of_all_tasks("ls", 0.75, error=2.0)]
    higher = {"b/accuracy", "all/last", "all/other"}
    made = tabulate(runs, experiment="synthetic", higher_is_better=higher, baselines=None)
    assert made.metrics == ("all/last", "a/error", "b/accuracy", "all/other")
    assert [(line.label, line.mean_rank) for line in made.rows] == [("ls", 1.5), ("uw", 1.0)]
    lower = tabulate(runs, experiment="synthetic", higher_is_better={"b/accuracy"}, baselines=None)
    assert [line.label for line in lower.rows] == ["uw", "ls"]
    baselines = {"a/error": 1.0, "b/accuracy": 0.5}
    relative = tabulate(runs, experiment="synthetic", higher_is_better=higher, baselines=baselines)
    assert [(line.label, line.delta_m.mean) for line in relative.rows] == [("uw", 0), ("ls", 50)]


def test_the_main_result_of_all_tasks_has_the_name_of_a_metric_of_tasks():
    """Whatever order the store returns."""
    assert main_summary(["all/area", "all/success", "a/success"]) == "all/success"
    assert main_summary(["all/area", "all/best", "a/success"]) == "all/area"
    assert main_summary(["a/success"]) is None


def test_the_first_result_of_all_tasks_has_an_interval():
    runs = [of_all_tasks("ls", success, seed=seed) for seed, success in enumerate((0.25, 0.5, 0.75))]
    made = tabulate(runs, experiment="synthetic", higher_is_better={"all/last"}, baselines=None)
    header, (line,) = cells(made)
    place = header.index("all/last ↑")
    assert header[place + 1] == "95 % interval"
    assert [cell.text for cell in line[place : place + 2]] == ["0.50 ± 0.14", "-0.12 to 1.12"]
    assert header.count("95 % interval") == 1


def test_metrics_of_all_tasks_alone_are_ranked():
    runs = [
        replace(of_all_tasks(method, success), metrics={"all/x": success}) for method, success in (("ls", 1.0), ("uw", 2.0))
    ]
    made = tabulate(runs, experiment="synthetic", higher_is_better=(), baselines=None)
    assert [(line.label, line.mean_rank) for line in made.rows] == [("ls", 1), ("uw", 2)]


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
    made = table([run(), RecordedRun("x", "uw", None, 0, odd.settings, {"a/error": 1.0})])
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
    with pytest.raises(ValueError, match="No finished runs"):
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


def named(name, *arguments, **settings):
    return replace(run(*arguments, settings=settings), configuration=name)


def test_named_configurations_are_labelled_by_their_names():
    runs = [named("small", **{"model.width": "1"}), named("large", **{"model.width": "9"}), run("uw")]
    assert {row.label for row in table(runs).rows} == {"small", "large", "uw model.width=None"}


def test_runs_of_a_name_with_different_settings_are_different_rows():
    runs = [named("a", **{"train.lr": rate}) for rate in ("1", "2")] + [named("b", "uw")]
    assert {row.label for row in table(runs).rows} == {"a train.lr=1", "a train.lr=2", "b"}


def test_a_name_of_several_methods_is_followed_by_the_methods():
    assert {row.label for row in table([named("a"), named("a", "uw")]).rows} == {"a (ls)", "a (uw)"}


def test_all_seeds_of_a_configuration_get_its_newest_name():
    runs = [run(seed=2), replace(run(seed=1), configuration="new"), replace(run(seed=0), configuration="old"), run("uw")]
    assert {row.label: row.seeds for row in table(runs).rows} == {"new": (0, 1, 2), "uw": (0,)}


def test_runs_on_different_data_are_not_compared():
    with pytest.raises(ValueError, match=r"data\.seed=1 and data\.seed=0.*--per=data\.seed"):
        table([run(), run("uw", settings={"data.seed": "1"})])
