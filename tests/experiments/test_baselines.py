import shutil

import pytest

from experiments import baselines, compare, sweep
from experiments.analysis import baselines as reference
from experiments.problems import base as experiment
from experiments.sweeps import runtime as estimate


@pytest.mark.slow
def test_sweep_baselines_and_table_of_another_experiment(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(estimate, "BUDGET", 0.01)
    words = ["--experiment=toy", f"--output_dir={tmp_path}", "data.steps=3", "train.epochs=1", "log_model=false"]
    assert sweep.main([*words, "--loss_method=ls,famo", "--jobs=1"]) == 0
    assert "stl f1" in capfd.readouterr().out
    assert compare.main(["--experiment=toy", f"--output_dir={tmp_path}", "--table_only", "--format=csv"]) == 0
    assert "famo" in capfd.readouterr().out
    assert baselines.main([*words, "--seeds=1", "--jobs=1", f"--output={tmp_path}/baselines.yaml"]) == 0
    assert set(reference.read_file(tmp_path / "baselines.yaml")[0].metrics) == {"f1/above_bound", "f2/above_bound"}


def test_the_first_baselines_of_an_experiment(tmp_path, monkeypatch):
    """Its runs look for the file that they are made for."""
    (tmp_path / "toy").mkdir()
    shutil.copy(experiment.FOLDER / "toy" / "config.yaml", tmp_path / "toy")
    monkeypatch.setattr(experiment, "FOLDER", tmp_path)
    words = ["--experiment=toy", f"--output_dir={tmp_path}/runs", "data.steps=3", "train.epochs=1", "log_model=false"]
    file = tmp_path / "toy" / "baselines.yaml"
    assert baselines.main([*words, "--seeds=1", "--jobs=1", f"--output={file}"]) == 0
    assert set(reference.shipped("toy")[0].metrics) == {"f1/above_bound", "f2/above_bound"}


def test_baselines_that_cannot_be_written_cost_no_run(tmp_path, capsys):
    words = ["--experiment=toy", f"--output_dir={tmp_path}/runs", f"--output={tmp_path}/missing/baselines.yaml"]
    with pytest.raises(SystemExit, match="2"):
        baselines.main(words)
    assert "missing/baselines.yaml" in capsys.readouterr().err


def test_a_sweep_without_baselines(tmp_path, capfd):
    words = ["--experiment=regression100", f"--output_dir={tmp_path}", "train.epochs=1", "--no_baselines", "--dry_run"]
    assert sweep.main(words) == 0
    assert "1 runs to do" in capfd.readouterr().out
