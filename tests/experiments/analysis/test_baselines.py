import pytest
import yaml

from balance.comparison.recorded_run import RecordedRun
from experiments.analysis import baselines as reference
from experiments.analysis import published_tables as published
from experiments.problems import base as experiment
from experiments.recording.fingerprint import common_of
from tests.experiments.short_runs import ROOT, configure


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "celeba", "quantum_chemistry", "quantum_chemistry_retuned"])
def test_settings_of_the_papers_are_those_of_their_tables(name):
    table = published.load(name)
    retuned = ["train.batch_size=60", "train.patience=10"] if name.endswith("retuned") else []
    words = [f"--experiment={table.experiment}", "protocol=paper", "data.path=x", *retuned]
    common = common_of(configure(*words))
    assert table.differences(dict(common)) == {}
    assert set(table.as_published) <= dict(common).keys()
    found = reference.for_run(table.experiment, common)
    assert found.metrics == {key: table.factors[key] * value for key, value in table.baselines.items()}
    for override in ("train.schedule=cosine", "train.report_last=3"):
        assert override.partition("=")[0] in table.differences(dict(common_of(configure(*words, override))))


def test_the_paper_compares_with_published_numbers_and_no_other_run_does():
    paper = configure("--experiment=nyuv2", "protocol=paper", "data.path=x")
    known = reference.for_run("nyuv2", common_of(paper))
    assert known.metrics["segmentation/miou"] == pytest.approx(0.3830)
    assert known.metrics["normals/mean_angle"] == 25.01
    for words in (["protocol=paper"], ["data.path=x"]):
        assert reference.for_run("nyuv2", common_of(configure("--experiment=nyuv2", *words))) is None
    celeba = configure("--experiment=celeba", "protocol=paper", "data.path=x")
    assert set(reference.for_run("celeba", common_of(celeba)).metrics) == set(experiment.find("celeba").metrics())


@pytest.mark.parametrize("name", ["digits", "multimnist", "nyuv2", "quantum_chemistry"])
def test_single_task_numbers_that_ship_are_of_the_default_settings(name):
    own = reference.for_run(name, common_of(configure(f"--experiment={name}")))
    assert own.origin == "single-task baselines"  # and not: measured with other settings
    assert set(own.metrics) == set(experiment.find(name).metrics())


def test_single_task_numbers_hold_for_their_protocol_alone():
    common = dict(common_of(configure()))
    assert reference.for_run("digits", tuple(common.items())) is not None
    assert reference.for_run("digits", tuple((common | {"protocol": "paper"}).items())) is None


def test_baselines_cover_every_metric():
    known, settings = reference.shipped("digits")
    assert set(known.metrics) == {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    text = (ROOT / "experiments/problems/digits/baselines.yaml").read_text(encoding="utf-8")
    stored = yaml.safe_load(text)
    assert stored["command"].startswith("python experiments/baselines.py")
    assert all(len(row["runs"]) == 3 for row in stored["metrics"].values())
    config = configure()
    assert settings == dict(common_of(config))  # they were measured with what is the default now


def test_tasks_of_recorded_single_task_runs_are_of_their_data():
    """JSONL files give llm other tasks, and more of them, than its default."""
    pytest.importorskip("peft")
    settings = {"data.source": "jsonl", "data.path": "mixture"}
    tasks = [f"set{k}" for k in range(5)]
    runs = [
        RecordedRun(task, "stl", None, 0, settings | {"loss.main_task": str(k)}, {f"{task}/loss": float(k + 1)}, task=task)
        for k, task in enumerate(tasks)
    ]
    common = runs[0].common
    assert reference.with_settings("llm", common, runs).metrics == {f"set{k}/loss": k + 1.0 for k in range(5)}
    assert reference.with_settings("llm", (), runs) is None
