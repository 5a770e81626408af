"""The command study.py: from trials to the report, and what it refuses."""

import json
import math

import pytest
import torch
import yaml

import balance
from balance.comparison.store import Store
from experiments import study as script
from experiments.problems import base as problems
from experiments.studies import costs
from experiments.studies.choice import Judge, choose, judge_of, records
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record
from experiments.studies.study_file import read_study
from experiments.studies.trials import trials, with_seed
from tests.experiments.short_runs import TINY
from tests.experiments.test_sweep import without_measurements

STUDY = {
    "seeds": 2,
    "tuning_seed": 7,
    "rates": [1, 0.01],
    "methods": {
        "ls": {},
        "constant": {"loss_method": "constant", "random_weights": True},
        "nashmtl": {"gradient_method": "nashmtl"},
    },
    "problems": {
        "small digits": {"experiment": "digits", "overrides": [*TINY["digits"], "train.epochs=1"]},
        "regression": {
            "experiment": "burgers",
            "overrides": [*TINY["burgers"], "train.epochs=2"],
            "reference": "ls",
            "metrics": ["residual/relative_l2"],
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output of a study in this process; all of its runs are tiny."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        without_measurements(patch)
        patch.setattr(costs, "ROUNDS", 1)
        assert script.main(words(folder)) == 0
    return folder


@pytest.fixture
def registries(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(balance.gradient_balancers, "_methods", dict(balance.gradient_balancers._methods))


def words(folder, *more):
    return [f"--file={folder / 'study.yaml'}", f"--output_dir={folder / 'runs'}", "--jobs=1", *more]


def test_report_has_all_methods_problems_and_figures(folder):
    output = folder / "runs" / "study"
    assert {file.name for file in output.iterdir()} == {
        "record.json",
        "report.md",
        "critical_difference.png",
        "delta_m.png",
        "cost.png",
    }
    text = (output / "report.md").read_text()
    for name in ("ls", "constant", "nashmtl", "small digits", "regression", "advice of diagnose"):
        assert f"| {name} " in text or f" {name} |" in text
    record = read_record(output / "record.json")
    assert (record.seeds, record.trials) == (2, 2)
    for problem in record.problems.values():
        for result in problem.methods.values():
            assert set(result.delta_m) == {0, 1}
            assert len(result.scores) == 2
            assert result.step_seconds > 0
            assert result.failed == 0


def test_every_method_has_equal_budgets(folder):
    for name in ("digits", "burgers"):
        runs = [run for run in Store(name, str(folder / "runs")).runs() if not run.is_single_task]
        seeds = {
            method: sorted(run.seed for run in runs if (run.loss_method, run.gradient_method) == method)
            for method in {(run.loss_method, run.gradient_method) for run in runs}
        }
        assert len(seeds) == 3
        assert set(map(tuple, seeds.values())) == {(0, 1, 7, 7)}


def test_chosen_trial_has_the_smallest_validation_score_and_results_are_of_the_test(folder):
    """Computed anew from the tracking store; the score must be of validation metrics, the result of test metrics."""
    study = read_study(folder / "study.yaml")
    further = (f"output_dir={folder / 'runs'}",)
    record = read_record(folder / "runs" / "study" / "record.json")
    problem = study.problems["small digits"]
    jobs = trials(study, "nashmtl", problem, further)
    recorded = records(jobs[0])
    judge = judge_of(study, problem, further, recorded)
    reference = judge.reference
    higher = problems.find("digits").HIGHER_IS_BETTER
    assert set(reference) == {f"{task}" for task in recorded.runs[jobs[0].fingerprint].metrics}
    scores = []
    for job in jobs:
        run = recorded.runs[job.fingerprint]
        histories = {name: recorded.store.client.get_metric_history(run.run_id, f"val/{name}") for name in reference}
        (values,) = zip(*[[point.value for point in history] for history in histories.values()], strict=True)
        drops = [
            (-1 if name in higher else 1) * (value - reference[name]) / reference[name]
            for name, value in zip(reference, values, strict=True)
        ]
        scores.append(100 * sum(drops) / len(drops))
    result = record.problems["small digits"].methods["nashmtl"]
    assert result.scores == pytest.approx(scores)
    choice = choose(jobs, recorded, judge)
    assert choice.job == jobs[scores.index(min(scores))]
    finals = {seed: recorded.runs[with_seed(choice.job, seed).fingerprint] for seed in (0, 1)}
    assert result.delta_m == pytest.approx({s: judge.delta_m(run.metrics) for s, run in finals.items()})
    assert f"train.lr={choice.job.config.train.lr:.6g}" in result.chosen


def test_mean_of_metrics_is_judged_where_single_ones_are_zero():
    judge = Judge({"a/f1": 0.0, "b/f1": 0.5}, {"a/f1", "b/f1"}, average=True)
    assert judge.delta_m({"a/f1": 0.1, "b/f1": 0.5, "c/f1": 9.0}) == pytest.approx(-20)
    assert Judge({"a": 1.0, "b": 3.0}, set(), average=True).delta_m({"a": 2.0, "b": 3.0}) == pytest.approx(25)
    assert Judge({"a": 1.0}, set()).delta_m({"a": math.nan}) == math.inf
    with pytest.raises(ValueError, match="average must be false"):
        Judge({"a": 1.0, "b": 3.0}, {"a"}, average=True).delta_m({"a": 2.0, "b": 3.0})


def test_problem_without_single_task_networks_compares_with_its_reference(folder):
    result = read_record(folder / "runs" / "study" / "record.json").problems["regression"]
    assert result.reference == "the first trial of ls"
    store = Store("burgers", str(folder / "runs"))
    first = next(run for run in store.runs() if run.seed == 7 and run.loss_method == "ls" and run.gradient_method is None)
    trial = min(
        (run for run in store.runs() if run.seed == 7 and run.loss_method == "ls" and run.gradient_method is None),
        key=lambda run: abs(float(run.settings["train.lr"]) - 0.005),
    )
    final = {r.seed: r for r in store.runs() if r.loss_method == "ls" and r.gradient_method is None and r.seed < 7}
    name = "residual/relative_l2"
    assert first.metrics.keys() == trial.metrics.keys()
    for seed, run in final.items():
        expected = 100 * (run.metrics[name] / trial.metrics[name] - 1)
        assert result.methods["ls"].delta_m[seed] == pytest.approx(expected)


def test_finished_study_trains_nothing_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr("experiments.training.loop.train", None)  # would be an error
    before = json.loads((folder / "runs" / "study" / "record.json").read_text())
    assert script.main(words(folder, "--problems=small digits,regression")) == 0
    after = json.loads((folder / "runs" / "study" / "record.json").read_text())
    for content in (before, after):
        for problem in content["problems"].values():
            for result in problem["methods"].values():
                del result["step_seconds"]
    assert before == after


def test_one_problem_has_a_record_and_no_ranks(folder, monkeypatch, capsys):
    monkeypatch.setattr(costs, "ROUNDS", 1)
    before = (folder / "runs" / "study" / "record.json").read_text()
    assert script.main(words(folder, "--problems=small digits")) == 0
    assert "Ranks and a report need two problems and three methods" in " ".join(capsys.readouterr().out.split())
    assert list(read_record(folder / "runs" / "study" / "record.json").problems) == ["small digits"]
    (folder / "runs" / "study" / "record.json").write_text(before)


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path, monkeypatch, capsys):
    without_measurements(monkeypatch)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    assert script.main(words(tmp_path, "--dry_run")) == 0
    printed = capsys.readouterr().out
    assert "small digits" in printed
    assert "about" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["study.yaml"]


def written(folder, **changes):
    """Write a study of one seed and one trial, with two problems on the digits."""
    one, two = (STUDY["problems"]["small digits"] | {"overrides": [*TINY["digits"], f"train.epochs={k}"]} for k in (1, 2))
    small = {"seeds": 1, "rates": [1], "problems": {"one": one, "two": two}}
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | small | changes))


def test_method_that_fails_is_reported_and_ranks_last(tmp_path, monkeypatch, capsys, registries):
    def fail(gramian):
        raise ValueError("broken")

    balance.gradient_balancers.register("broken")(fail)
    without_measurements(monkeypatch)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    written(tmp_path, methods={"ls": {}, "broken": {"gradient_method": "broken"}, "nashmtl": {"gradient_method": "nashmtl"}})
    assert script.main(words(tmp_path)) == 1
    assert "broken" in capsys.readouterr().out
    record = read_record(tmp_path / "runs" / "study" / "record.json")
    assert record.problems["one"].methods["broken"].mean == math.inf
    assert rank_methods(record).ranks["broken"] == 3
    text = (tmp_path / "runs" / "study" / "report.md").read_text()
    assert "- 1 of 2 runs of broken on one failed." in text
    assert "| broken | 3.0 | - | failed | failed |" in text
    assert "runs of ls" not in text


def test_method_that_fails_with_one_test_seed_fails(tmp_path, monkeypatch, registries):
    """A mean over the other seeds would flatter it."""
    state = {"runs": 0}

    def sometimes(gramian):
        if torch.initial_seed() == 1:
            raise ValueError("unlucky")
        state["runs"] += 1
        return torch.ones_like(gramian[0])

    balance.gradient_balancers.register("sometimes")(sometimes)
    without_measurements(monkeypatch)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    methods = {"ls": {}, "sometimes": {"gradient_method": "sometimes"}, "uw": {"loss_method": "uw"}}
    written(tmp_path, seeds=2, methods=methods)
    assert script.main(words(tmp_path)) == 1
    record = read_record(tmp_path / "runs" / "study" / "record.json")
    result = record.problems["one"].methods["sometimes"]
    assert math.isfinite(result.delta_m[0])
    assert result.delta_m[1] == result.mean == math.inf
    assert result.failed == 1
    assert rank_methods(record).ranks["sometimes"] == 3
    assert state["runs"]


def test_problem_whose_reference_fails_stops_no_other_problem(tmp_path, monkeypatch, capsys):
    without_measurements(monkeypatch)
    diverging = {"experiment": "digits", "overrides": [*TINY["digits"], "train.epochs=1", "train.lr=1e9"]}
    small = {"experiment": "digits", "overrides": [*TINY["digits"], "train.epochs=2"]}
    written(tmp_path, methods={"ls": {}, "uw": {"loss_method": "uw"}}, problems={"one": diverging, "two": small})
    assert script.main(words(tmp_path)) == 1
    assert "No report: delta_m of 'digits' needs the single-task networks, which did not finish." in capsys.readouterr().out
    assert sum(run.finished and run.seed == 0 for run in Store("digits", str(tmp_path / "runs")).runs()) == 6  # four are stl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"ls": {}, "uw": {"loss_method": "uww"}}}, "Did you mean 'uw'"),
        ({"methods": {"ls": {}, "cagrad": {"gradient_method": "cagrad", "search": {"gradient.d": [1]}}}}, "gradient.d"),
        ({"problems": {"one": {"experiment": "digit"}}}, "Did you mean 'digits'"),
        ({"problems": {"one": {"experiment": "digits", "overrides": ["train.epoch=3"]}}}, "train.epochs"),
    ],
)
def test_mistakes_of_a_run_are_refused_before_any_run(tmp_path, capsys, changes, message):
    written(tmp_path, **changes)
    with pytest.raises(SystemExit) as caught:
        script.main(words(tmp_path))
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert [file.name for file in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--problems=digit"], "problem of the study 'digit'"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--cluster=tcp://host:1"], "--cluster needs --backend=ray or --backend=dask"),
        (["--file=none.yaml"], "none.yaml"),
        (["--backend=spark"], "invalid choice"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        script.main(more)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
