"""Loggers in addition to MLflow, in a run of the trainer."""

import json

import pytest

from experiments.recording.fingerprint import fingerprint
from tests.experiments.short_runs import configure, refused, run_in, train


def test_a_run_writes_into_its_folder_what_mlflow_has(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    final = train(*tiny("digits", "track=true", "loggers=[tensorboard]", "log_every=1", "log_model=false"))
    recorded, _ = run_in(tmp_path, "digits")
    read = EventAccumulator(str(tmp_path / "runs" / "digits" / recorded.info.run_name / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(recorded.data.metrics)
    (point,) = read.Scalars("final/left/accuracy")
    assert point.value == pytest.approx(final["left/accuracy"])
    assert len(read.Scalars("loss/left")) == 2
    assert set(json.loads(recorded.data.tags["higher_is_better"])) == {"left/accuracy", "right/accuracy"}


def test_single_task_runs_declare_their_task(tiny, tmp_path):
    train(*tiny("digits", "track=true", "--loss_method=stl", "loss.main_task=2", "log_model=false"))
    recorded, _ = run_in(tmp_path, "digits")
    assert recorded.data.tags["single_task"] == "sum"


def test_loggers_do_not_decide_the_result():
    assert fingerprint(configure("loggers=[tensorboard]")) == fingerprint(configure())


def test_loggers_that_are_unknown_or_not_installed_are_refused(tiny, tmp_path, capsys, monkeypatch):
    assert "loggers must be one of tensorboard, wandb" in refused(tiny("digits", "loggers=[tensorbord]"), capsys, tmp_path)
    monkeypatch.setattr("balance.messages.importlib.util.find_spec", lambda _: None)
    assert "pip install 'mtl-balance[wandb]'" in refused(tiny("digits", "loggers=[wandb]"), capsys, tmp_path)
