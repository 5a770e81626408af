"""Runs of a user's own training loop, from the tracker to the comparison."""

import csv
import io
import json
import math
import shutil
import sys

import pytest
import torch

import balance
from balance.tracking import Tracker, recorded_experiments

TASKS = ("digit", "depth")
HIGHER = ("digit/accuracy",)
KNOWN = {"digit/accuracy": 0.8, "depth/rmse": 2.0}


def record(experiment, folder, loss="ls", gradient=None, seed=0, *, accuracy=0.4, rmse=3.0, final=None, **options):
    """Record a run of one step, with final metrics that are known."""
    balancer = balance.Balancer(TASKS, loss=loss, gradient=gradient, loss_options={"main_task": 1} if loss == "stl" else None)
    options = {"higher_is_better": HIGHER} | options
    with Tracker(experiment, folder, balancer=balancer, seed=seed, **options) as tracker:
        shared = torch.ones(2, requires_grad=True)
        balancer.backward({"digit": shared.sum(), "depth": shared.square().sum()}, shared=[shared])
        tracker.log_metrics(balancer.report.as_metrics(), 0)
        tracker.log_final({"digit/accuracy": accuracy, "depth/rmse": rmse} if final is None else final)
    return tracker.run_id


@pytest.fixture(scope="module")
def folder(empty_database, tmp_path_factory):
    """A store with several experiments."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(empty_database, folder / "mlflow.db")
    for seed in (0, 1):
        record("plain", folder, seed=seed)
        record("plain", folder, "uw", "pcgrad", seed, accuracy=0.8, rmse=2.0)
        record("with-stl", folder, seed=seed)
        record("with-stl", folder, "stl", seed=seed, rmse=1.5)
    with Tracker("with-stl", folder, loss_method="stl", seed=0, higher_is_better=HIGHER) as alone:
        alone.log_final({"digit/accuracy": 0.5})
    record("declared", folder, baselines=KNOWN)
    return folder


def cell(comparison, label, name):
    (row,) = [row for row in comparison.table.rows if row.label == label]
    return row.metrics[name]


def test_own_runs_become_a_table(folder):
    made = balance.compare("plain", folder)
    assert [row.label for row in made.table.rows] == ["uw + pcgrad", "ls"]
    assert made.table.higher_is_better == {"digit/accuracy"}
    assert [row.mean_rank for row in made.table.rows] == [1, 2]
    assert cell(made, "ls", "depth/rmse").values == {0: 3.0, 1: 3.0}
    assert cell(made, "uw + pcgrad", "digit/accuracy").verdict == "best"
    assert made.table.rows[0].delta_m is None
    assert "no baselines are declared, and no single-task runs are recorded" in made.table.notes[-1]


def test_forms_of_a_comparison(folder):
    made = balance.compare("plain", folder, title="Two methods")
    shown = str(made)
    assert "uw + pcgrad" in shown
    assert "0.800 ± 0.000 *" in shown
    assert "*: best mean" in shown
    assert "bold" not in shown
    assert "- No delta_m" in shown
    assert shown.startswith("Two methods")
    assert repr(made) == "Comparison('plain', rows: uw + pcgrad, ls)"
    assert "**0.800 ± 0.000**" in made.to_markdown()
    assert "- No delta_m" in made._repr_markdown_()
    assert r"\toprule" in made.to_latex()
    assert {row["method"] for row in json.loads(made.to_json())["rows"]} == {"ls", "uw + pcgrad"}
    assert {line["method"] for line in csv.DictReader(io.StringIO(made.to_csv()))} == {"ls", "uw + pcgrad"}
    assert "<h1>Comparison of methods on plain, Two methods</h1>" in made.to_html()
    with pytest.raises(ValueError, match="Did you mean 'depth/rmse'"):
        made.to_html(("depth/rms", "digit/accuracy"))


def test_the_report_is_written(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("balance.comparison.figures.gallery.every_figure", lambda *a: drawn.append(a) or {})
    balance.compare("plain", folder, output=tmp_path / "here")
    assert "uw + pcgrad" in (tmp_path / "here" / "report.html").read_text(encoding="utf-8")
    ((_, curves, axes),) = drawn
    assert curves["ls"]["loss/digit"][1].tolist() == [2.0]  # the mean over both seeds
    assert axes is None


def test_the_report_has_a_place_next_to_the_runs(folder):
    assert balance.compare("declared", folder).folder == folder.resolve() / "declared" / "comparison"


def test_recorded_single_task_runs_are_baselines_and_no_rows(folder):
    """Accuracy 0.4 against 0.5 and error 3 against 1.5: delta_m is (20 + 100) / 2."""
    made = balance.compare("with-stl", folder)
    assert [row.label for row in made.table.rows] == ["ls"]
    assert made.table.baselines == {"digit/accuracy": 0.5, "depth/rmse": 1.5}
    assert made.table.rows[0].delta_m.mean == pytest.approx(60)
    assert balance.compare("with-stl", folder, baselines="none").table.baselines is None


def test_declared_and_given_baselines(folder):
    """Accuracy 0.4 against 0.8 and error 3 against 2: delta_m is (50 + 50) / 2."""
    assert balance.compare("declared", folder).table.rows[0].delta_m.mean == pytest.approx(50)
    assert balance.compare("declared", folder).table.baselines_from == "as the runs declare them"
    given = balance.compare("declared", folder, baselines={"digit/accuracy": 0.4, "depth/rmse": 1.5})
    assert given.table.rows[0].delta_m.mean == pytest.approx(50)
    with pytest.raises(ValueError, match="baseline of 'depth/rmse'"):
        balance.compare("declared", folder, baselines={"digit/accuracy": 0.4})


def test_chosen_runs_and_settings(folder):
    made = balance.compare("plain", folder, settings={"seed": 1})
    assert {row.seeds for row in made.table.rows} == {(1,)}
    one = made.table.rows[0].runs[0].run_id
    assert [run.run_id for run in balance.compare("plain", folder, runs=[one]).table.rows[0].runs] == [one]
    with pytest.raises(ValueError, match="Did you mean 'loss_method'"):
        balance.compare("plain", folder, settings={"lossmethod": "ls"})


def test_parameters_make_rows_and_tags_do_not(folder):
    for rate in (0.1, 0.2):
        record("rates", folder, params={"lr": rate}, tags={"host": f"h{rate}"})
    assert {row.label for row in balance.compare("rates", folder).table.rows} == {"ls lr=0.1", "ls lr=0.2"}


def test_options_of_a_balancer_make_rows(folder):
    for c in (0.4, 0.9):
        balancer = balance.Balancer(TASKS, gradient="cagrad", gradient_options={"c": c} if c != 0.4 else None)
        with Tracker("options", folder, balancer=balancer, seed=0, higher_is_better=()) as tracker:
            tracker.log_final({"depth/rmse": c})
    assert {row.label for row in balance.compare("options", folder).table.rows} == {
        "ls + cagrad gradient.c=0.4",
        "ls + cagrad gradient.c=0.9",
    }


def test_runs_without_final_metrics_are_named_until_they_are_repeated(folder):
    balancer = balance.Balancer(TASKS)
    with Tracker("forgotten", folder, balancer=balancer, seed=0, higher_is_better=HIGHER) as tracker:
        pass
    with pytest.raises(ValueError, match=rf"run {tracker.run_id} \(ls, seed 0\) has none.*log_final"):
        balance.compare("forgotten", folder)
    record("forgotten", folder)
    assert len(balance.compare("forgotten", folder).table.rows) == 1


def test_unequal_metrics_are_named(folder):
    record("unequal", folder)
    odd = record("unequal", folder, "uw", final={"digit/accuracy": 0.5})
    with pytest.raises(ValueError, match=rf"run {odd} \(uw, seed 0\) lacks depth/rmse"):
        balance.compare("unequal", folder)


def test_directions_that_disagree_or_are_missing(folder):
    record("disagree", folder)
    record("disagree", folder, "uw", higher_is_better=())
    with pytest.raises(ValueError, match="must declare equal higher_is_better, but run"):
        balance.compare("disagree", folder)
    made = balance.compare("disagree", folder, higher_is_better=HIGHER)
    assert made.table.higher_is_better == {"digit/accuracy"}
    with pytest.raises(ValueError, match="Did you mean 'digit/accuracy'"):
        balance.compare("disagree", folder, higher_is_better=("digit/acuracy",))
    with Tracker("undeclared", folder, params={"loss_method": "ls", "seed": 0}) as tracker:
        tracker.log_metrics({"final/depth/rmse": 1.0}, 0)
    with pytest.raises(ValueError, match=r"does not. Use Tracker\(..., higher_is_better"):
        balance.compare("undeclared", folder)


def test_infinite_final_metrics_rank_last(folder):
    record("infinite", folder, rmse=math.inf)
    record("infinite", folder, "uw")
    made = balance.compare("infinite", folder)
    assert [row.label for row in made.table.rows] == ["uw", "ls"]
    assert any("ls has NaN for depth/rmse" in note for note in made.table.notes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runs": "abc"}, TypeError, "must be sequences"),
        ({"higher_is_better": "digit/accuracy"}, TypeError, "must be sequences"),
        ({"baselines": "no"}, TypeError, "dict of numbers by metric, or 'none', but got 'no'"),
        ({"baselines": {"digit/accuracy": 0}}, ValueError, "other than zero"),
        ({"runs": ["abc"]}, ValueError, "No run 'abc' of 'plain' has ended"),
    ],
)
def test_mistakes(folder, options, error, message):
    with pytest.raises(error, match=message):
        balance.compare("plain", folder, **options)


def test_unknown_experiments(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No recorded runs of 'balance/plane'.*Did you mean 'balance/plain'"):
        balance.compare("plane", folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        balance.compare("plain", tmp_path)
    assert {"plain", "with-stl"} <= set(recorded_experiments(folder))
    assert recorded_experiments(tmp_path) == []


def test_missing_packages_are_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("balance.comparison")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(ModuleNotFoundError, match=r"jinja2 is required.*pip install 'mtl-balance\[compare\]'"):
        balance.compare  # noqa: B018
