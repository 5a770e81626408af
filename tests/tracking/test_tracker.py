import math
import time

import pytest

from balance.tracking import Tracker, git_tags, without_password
from balance.tracking.tracker import BATCH
from tests.tracking.reading import client, the_run


def start(folder, **changes):
    arguments = {"name": "run", "tags": {"loss_method": "uw", "seed": "3"}, "params": {"train.lr": 0.1, "loss": [1, 2]}}
    return Tracker("problem", folder, **(arguments | changes))


def test_a_run(folder):
    with start(folder):
        pass
    run = the_run(folder)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"train.lr": "0.1", "loss": "[1, 2]"}
    assert run.data.tags.items() >= {"loss_method": "uw", "seed": "3"}.items()
    assert run.data.tags.items() >= git_tags().items()
    assert str(folder) in client(folder).get_experiment(run.info.experiment_id).artifact_location


def test_metrics_are_written_in_batches_and_all_arrive(folder):
    with start(folder) as tracker:
        writes = []
        write = tracker._client.log_batch
        tracker._client.log_batch = lambda run_id, metrics: writes.append(len(metrics)) or write(run_id, metrics=metrics)
        for step in range(301):
            tracker.log_metrics({f"loss/{k}": step + k / 10 for k in range(4)}, step)
    assert writes == [BATCH, BATCH, 204]
    history = client(folder).get_metric_history(the_run(folder).info.run_id, "loss/2")
    assert [(m.step, m.value) for m in history] == [(step, step + 0.2) for step in range(301)]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED"), (SystemExit, "FAILED")])
def test_what_was_logged_stays_whatever_ends_the_run(folder, error, status):
    with pytest.raises(error), start(folder) as tracker:
        tracker.log_metrics({"loss/a": 1.5}, 0)
        raise error
    run = the_run(folder)
    assert run.info.status == status
    assert run.data.metrics == {"loss/a": 1.5}


def test_infinite_numbers_are_left_out_and_nan_is_kept(folder):
    with start(folder) as tracker:
        tracker.log_metrics({"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.0}, 0)
    metrics = the_run(folder).data.metrics
    assert set(metrics) == {"c", "d"}
    assert math.isnan(metrics["c"])


def test_text_artifact(folder):
    with start(folder) as tracker:
        tracker.log_text("key: value\n", "config.yaml")
        run_id = tracker.run_id
    from mlflow.artifacts import load_text

    run = client(folder).get_run(run_id)
    assert load_text(f"{run.info.artifact_uri}/config.yaml") == "key: value\n"


def test_disabled(tmp_path):
    with start(tmp_path / "nothing", enabled=False) as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.log_text("text", "file.txt")
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_of_several_processes_records(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with start(tmp_path / "nothing") as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
        tracker.log_file(tmp_path / "missing")
        tracker.log_dataset("data", digest="0", source="here", rows=1, context="training")
        tracker.log_model(tmp_path / "missing")
        tracker.set_tags({"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_a_run_below_another_and_its_end(folder):
    with start(folder) as parent, start(folder, parent=parent.run_id) as child:
        child.status = "FAILED"
    run = client(folder).get_run(child.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.info.status == "FAILED"
    assert client(folder).get_run(parent.run_id).info.status == "FINISHED"


def test_a_run_is_continued(folder):
    with pytest.raises(KeyboardInterrupt), start(folder) as tracker:
        raise KeyboardInterrupt
    with start(folder, run_id=tracker.run_id, tags={}, params={"train.lr": 0.1}) as again:
        assert the_run(folder).info.status == "RUNNING"
        again.log_metrics({"a": 2.0}, 5)
    run = the_run(folder)
    assert (run.info.status, run.data.metrics, run.data.params["train.lr"]) == ("FINISHED", {"a": 2.0}, "0.1")


def test_many_parameters(folder):
    with start(folder, params={f"p{k}": k for k in range(250)}):
        pass
    assert the_run(folder).data.params == {f"p{k}": str(k) for k in range(250)}


def test_data_files_and_tags(folder):
    (folder / "file.txt").write_text("text", encoding="utf-8")
    with start(folder) as tracker:
        tracker.log_dataset("data", digest="abc", source="here", rows=7, context="validation")
        tracker.log_file(folder / "file.txt", "kept")
        tracker.set_tags({"a": "b"})
    run = the_run(folder)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("data", "abc", "validation")
    assert [file.path for file in client(folder).list_artifacts(run.info.run_id, "kept")] == ["kept/file.txt"]
    assert run.data.tags["a"] == "b"


def test_system_metrics_need_psutil(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install psutil"):
        start(tmp_path, system_metrics=True)


def test_passwords_are_not_shown(tmp_path, monkeypatch):
    assert without_password("postgresql://me:secret@host:5432/runs") == "postgresql://me:***@host:5432/runs"
    assert without_password("http://host:5000") == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://me:secret@server")
    with pytest.raises(OSError, match="cannot be used") as caught:
        start(tmp_path).__enter__()
    assert "secret" not in str(caught.value)


def test_tracking_uri_is_respected(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    with start(tmp_path / "elsewhere") as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
    assert the_run(folder).data.metrics == {"a": 1.0}
    assert not (tmp_path / "elsewhere").exists()


def test_a_store_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    with pytest.raises(OSError, match="MLflow at nonsense://server cannot be used"):
        start(tmp_path).__enter__()


def test_time_in_the_tracker_is_counted(folder):
    with start(folder) as tracker:
        tracker._client.log_batch = lambda *a, **k: time.sleep(0.02)
        tracker.log_metrics({str(k): 0.0 for k in range(BATCH)}, 0)
        assert tracker.seconds >= 0.02
