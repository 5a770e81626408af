"""The command that compares recorded runs: what it chooses, prints, writes, logs and refuses."""

import csv
import io
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from balance.comparison.figures.gallery import CAPTIONS
from balance.tracking import Tracker
from experiments import compare, sweep
from experiments.analysis import published_tables
from experiments.problems import base as experiment
from experiments.sweeps import runtime as estimate

TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1", "log_model=false"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "BUDGET", 0.01)
        words = ["--gradient_method=none,mgda", "--seeds=2", "--jobs=1", *TINY, "log_every=1", f"--output_dir={folder}"]
        assert sweep.main(words) == 0
    return folder


@pytest.fixture
def printed(swept, capfd):
    def run(*words):
        capfd.readouterr()
        assert compare.main([f"--output_dir={swept}", *words]) == 0
        return capfd.readouterr()

    return run


def store(folder):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return client, client.get_experiment_by_name("balance/digits").experiment_id


def test_the_report_is_written_and_kept_with_the_sweep(swept, printed, tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "private.txt").write_text("not for the server", encoding="utf-8")
    told = printed(f"--output={folder}")
    assert f"Report: {folder / 'report.html'}" in told.err
    names = {file.name for file in folder.iterdir()}
    figures = {f"{name}.{kind}" for name in CAPTIONS for kind in ("pdf", "png")}
    assert names - {"private.txt"} == {"report.html", *figures}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "ls + mgda" in page
    client, experiment = store(swept)
    (parent,) = client.search_runs([experiment], "tags.kind = 'sweep'")
    kept = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "comparison")}
    assert kept == {f"comparison/{name}" for name in names - {"private.txt"}}


def test_single_task_networks_are_the_reference_and_no_row(swept, printed):
    made = json.loads(printed("--table_only", "--format=json").out)
    assert {row["method"] for row in made["rows"]} == {"ls", "ls + mgda"}
    client, experiment = store(swept)
    alone = client.search_runs([experiment], "tags.kind = 'baseline' and params.`loss.main_task` = '2'")
    assert made["baselines"]["sum/mae"] == pytest.approx(sum(run.data.metrics["final/sum/mae"] for run in alone) / 2)


def test_formats_agree(printed):
    numbers = json.loads(printed("--table_only", "--format=json").out)
    lines = list(csv.DictReader(io.StringIO(printed("--table_only", "--format=csv").out)))
    drops = {line["method"]: float(line["mean"]) for line in lines if line["quantity"] == "delta_m"}
    for row in numbers["rows"]:
        assert drops[row["method"]] == pytest.approx(row["delta_m"]["mean"])
    for form in ("table", "markdown", "latex"):
        assert "mgda" in printed("--table_only", f"--format={form}").out
    assert "too few" in printed("--table_only").out
    assert "\\toprule" in printed("--table_only", "--format=latex").out


def test_chosen_runs_and_sweeps(swept, printed):
    client, experiment = store(swept)
    (parent,) = client.search_runs([experiment], "tags.kind = 'sweep'")
    one = client.search_runs([experiment], "tags.gradient_method = 'mgda' and tags.seed = '1'")[0].info.run_id
    other = client.search_runs([experiment], "tags.gradient_method = 'mgda' and tags.seed = '0'")[0].info.run_id
    made = json.loads(printed("--table_only", "--format=json", "--runs", one, other).out)
    assert [(row["method"], row["seeds"]) for row in made["rows"]] == [("ls + mgda", [0, 1])]
    made = json.loads(printed("--table_only", "--format=json", "--runs", parent.info.run_id).out)
    assert len(made["rows"]) == 2


def test_only_runs_with_a_setting(printed):
    made = json.loads(printed("--table_only", "--format=json", "seed=1", "train.lr=3e-3", "train.epochs=1.0").out)
    assert {tuple(row["seeds"]) for row in made["rows"]} == {(1,)}
    words = ("--table_only", "--format=json", "gradient_method=None")
    assert [row["method"] for row in json.loads(printed(*words).out)["rows"]] == ["ls"]


def test_baselines_from_a_file_and_none(printed, tmp_path):
    file = tmp_path / "mine.yaml"
    rows = {name: {"mean": 1.0} for name in ("left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse")}
    file.write_text(yaml.safe_dump({"metrics": rows}), encoding="utf-8")
    made = json.loads(printed("--table_only", "--format=json", f"--baselines={file}").out)
    row = made["rows"][0]
    mean = {name: estimate["mean"] for name, estimate in row["metrics"].items()}
    by_hand = (
        (1 - mean["left/accuracy"]) + (1 - mean["right/accuracy"]) + (mean["sum/mae"] - 1) + (mean["reconstruction/rmse"] - 1)
    )
    assert row["delta_m"]["mean"] == pytest.approx(25 * by_hand)
    assert "delta_m" not in printed("--table_only", "--baselines=none").out.splitlines()[2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Runs of famo on nyuv2, as if the trainer had made them: two on the files of NYUv2, two on scenes."""
    folder = tmp_path_factory.mktemp("recorded")
    table = published_tables.load("nyuv2")
    alone = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    for source, seed in product(("files", "scenes"), (0, 1)):
        params = {"loss_method": "famo", "gradient_method": None, "seed": seed, "data.source": source, "train.epochs": 3}
        with Tracker("nyuv2", folder, name="famo", tags={}, params=params) as tracker:
            tracker.log_metrics({f"final/{name}": value * (1 + 0.01 * seed) for name, value in alone.items()}, step=1)
    return folder


@pytest.fixture
def nyuv2(monkeypatch, capfd):
    monkeypatch.setattr(experiment, "names", lambda: ("digits", "nyuv2"))

    def run(folder, *words):
        capfd.readouterr()
        assert compare.main(["--experiment=nyuv2", "--published", f"--output_dir={folder}", *words]) == 0
        return capfd.readouterr()

    return run


FORMS = ("table", "markdown", "latex", "csv", "json")


@pytest.mark.parametrize("form", FORMS)
def test_published_results_beside_runs_on_the_same_data(recorded, nyuv2, form):
    told = nyuv2(recorded, "data.source=files", "--baselines=none", "--table_only", f"--format={form}").out
    assert "GO4Align" in told
    if form == "json":
        content = json.loads(told)
        assert [row["method"] for row in content["rows"]] == ["famo"]
        assert content["published"][0]["comparable_with_rows"] is True
    elif form == "csv":
        assert {line["data"] for line in csv.DictReader(io.StringIO(told))} == {"NYUv2"}
    else:
        assert "The runs here are on NYUv2 too, but with train.epochs=3 (papers: 200)." in told
        assert "here: famo" in told
        assert told.index("here: famo") > told.index("famo")


@pytest.mark.parametrize("form", FORMS)
def test_published_results_and_runs_on_other_data(recorded, nyuv2, form):
    told = nyuv2(recorded, "data.source=scenes", "--baselines=none", "--table_only", f"--format={form}").out
    assert "GO4Align" in told
    assert "here: famo" not in told
    if form == "csv":
        found = list(csv.DictReader(io.StringIO(told)))
        assert {(line["method"], line["data"]) for line in found if not line["source"]} == {("famo", "data.source=scenes")}
    else:
        assert "Not comparable with the runs here, which have other data (data.source=scenes) than this table (NYUv2)." in told


@pytest.mark.parametrize("form", FORMS)
def test_published_results_without_runs(nyuv2, form, tmp_path):
    told = nyuv2(tmp_path, f"--format={form}", "train.epochs=3")
    assert "mlflow.db does not exist" in told.err
    assert "No report is written" in told.err
    for name in published_tables.load("nyuv2").methods:
        assert name in told.out
    assert list(tmp_path.iterdir()) == []


def test_published_results_where_nothing_has_finished(nyuv2, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Tracker("nyuv2", tmp_path, name="", tags={}, params={"loss_method": "ls", "seed": 0}),
    ):
        raise KeyboardInterrupt
    assert "No finished runs of 'nyuv2'" in nyuv2(tmp_path).err


def test_published_results_of_reinforcement_learning(capfd, tmp_path):
    assert compare.main(["--experiment=metaworld", "--published", f"--output_dir={tmp_path}"]) == 0
    told = capfd.readouterr()
    assert "Multi-head SAC" in told.out
    assert "mlflow.db does not exist" in told.err


def test_published_results_are_in_the_report(recorded, nyuv2, tmp_path):
    nyuv2(recorded, "data.source=scenes", "--baselines=none", f"--output={tmp_path}")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Published results on NYUv2" in page
    assert 'class="warning">Not comparable' in page


@pytest.mark.usefixtures("nyuv2")
def test_mistakes_beside_published_results(recorded, capfd, tmp_path):
    words = ("--experiment=nyuv2", "--published")
    assert "mlflow.db does not exist" in refused(capfd, *words, f"--output_dir={tmp_path}", "--runs", "0123")  # who names runs
    assert "No finished runs of 'nyuv2' with train.epochs=9" in refused(
        capfd, *words, f"--output_dir={recorded}", "train.epochs=9"
    )
    none = refused(capfd, "--published", f"--output_dir={tmp_path}")
    assert "No published results of 'digits' are available. Available: celeba, cityscapes, metaworld, nyuv2," in none


@pytest.mark.parametrize(("width", "most"), [(100, 3), (130, 6), (60, 0)])
def test_a_narrow_terminal_shows_fewer_metrics_and_no_number_is_cut(nyuv2, tmp_path, monkeypatch, width, most):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    told = nyuv2(tmp_path).out
    assert f"{9 - most} further metrics" in " ".join(told.split())
    assert ("…" in told) == (width == 60)  # not even the ranks have room there


@pytest.fixture
def per_source(tmp_path, capfd):
    """Compare two methods on each of two sources of data, with validation metrics of two epochs."""
    accuracies = {("ls", "files"): 0.5, ("uw", "files"): 0.75, ("ls", "scenes"): 0.9, ("uw", "scenes"): 0.8}
    for (loss, source), seed in product(accuracies, (0, 1)):
        params = {"loss_method": loss, "gradient_method": None, "seed": seed, "data.source": source}
        accuracy = accuracies[loss, source] + 0.01 * seed
        with Tracker("digits", tmp_path, name=loss, tags={}, params=params) as tracker:
            for step in (1, 2):
                tracker.log_metrics({f"val/{task}/accuracy": accuracy * step / 2 for task in ("left", "right")}, step)
            tracker.log_metrics({f"final/{task}/accuracy": accuracy for task in ("left", "right")}, 2)

    def command(*words):
        capfd.readouterr()
        assert compare.main(["--per=data.source", "--baselines=none", f"--output_dir={tmp_path}", *words]) == 0
        return capfd.readouterr().out

    return command


def test_one_table_for_each_value_of_a_setting(per_source, tmp_path):
    shown = per_source("--table_only", "--format=markdown")
    files, scenes = shown.split("**data.source=scenes**")
    assert files.startswith("**data.source=files**")
    for part, best in ((files, "uw"), (scenes, "ls")):
        rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
        assert rows[2] == best
    content = json.loads(per_source("--table_only", "--format=json"))
    assert content["per"] == "data.source"
    assert {value: made["rows"][0]["method"] for value, made in content["comparisons"].items()} == {
        "files": "uw",
        "scenes": "ls",
    }
    lines = list(csv.DictReader(io.StringIO(per_source("--table_only", "--format=csv"))))
    means = {(line["data.source"], line["method"]): line["mean"] for line in lines if line["quantity"] == "left/accuracy"}
    assert float(means["files", "ls"]) == pytest.approx(0.505)
    assert len(means) == 4


def test_one_page_for_each_value_of_a_setting_and_a_figure_of_all(per_source, tmp_path):
    per_source(f"--output={tmp_path}/comparison")
    names = {file.relative_to(tmp_path / "comparison").as_posix() for file in (tmp_path / "comparison").rglob("*.*")}
    assert {"metrics_per_data.source.png", "metrics_per_data.source.pdf"} < names
    for source in ("files", "scenes"):
        assert f"data.source={source}/pareto.pdf" in names
        page = (tmp_path / "comparison" / f"data.source={source}" / "report.html").read_text(encoding="utf-8")
        assert f"Comparison of methods on digits, data.source={source}" in page


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        compare.main(list(words))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "0123"], "No run '0123' of 'digits' has ended"),
        (["train.epochs=7"], "No finished runs of 'digits' with train.epochs=7"),
        (["train.epoch=1"], "Unknown setting 'train.epoch'. Did you mean 'train.epochs'?"),
        (["--pareto=sum/mae"], "--pareto must be two metrics"),
        (["--pareto=sum/mae,left/acuracy"], "Did you mean 'left/accuracy'?"),
        (["--baselines=missing.yaml"], "missing.yaml must be a file as experiments/baselines.py writes it"),
        (["--format=word"], "invalid choice: 'word'"),
        (["--output=/dev/null/here"], "cannot write to /dev/null/here"),
        (["epochs"], "must read key=value"),
        (["--per=train.epoch"], "Unknown setting 'train.epoch'. Did you mean 'train.epochs'?"),
        (["--per=seed", "--published"], "--published must not be combined with --per"),
    ],
)
def test_mistakes(words, message, swept, capsys):
    assert message in refused(capsys, f"--output_dir={swept}", *words)


def test_a_baseline_of_zero(swept, tmp_path, capsys):
    file = tmp_path / "zero.yaml"
    file.write_text("metrics: {left/accuracy: {mean: 0}}", encoding="utf-8")
    assert "'left/accuracy' that is not zero" in refused(capsys, f"--output_dir={swept}", f"--baselines={file}")


def test_missing_baselines_are_told_with_the_way_out(swept, tmp_path, capsys):
    shutil.copy(swept / "mlflow.db", tmp_path / "mlflow.db")
    client, experiment = store(tmp_path)
    (alone,) = client.search_runs([experiment], "tags.kind = 'baseline' and tags.seed = '1' and params.`loss.main_task` = '0'")
    client.delete_run(alone.info.run_id)
    assert compare.main([f"--output_dir={tmp_path}", "--table_only"]) == 0  # there is another seed
    for run in client.search_runs([experiment], "tags.kind = 'baseline' and params.`loss.main_task` = '0'"):
        client.delete_run(run.info.run_id)
    error = refused(capsys, f"--output_dir={tmp_path}")
    assert "but none have" in error
    assert "train.epochs=1" in error
    assert "--baselines=none" in error


def test_nothing_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mlflow.db does not exist" in refused(capsys)
    assert "Did you mean 'digits'?" in refused(capsys, "--experiment=digit")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    assert "MLflow at nonsense://server cannot be used" in refused(capsys)
    assert list(Path(tmp_path).iterdir()) == []


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        compare.main(["--help"])
    assert caught.value.code == 0
    assert "example:\n  python experiments/compare.py --experiment=digits" in capsys.readouterr().out
