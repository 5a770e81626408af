import pytest

import balance
from balance.tracking import Logger, Loggers, TensorBoard, Tracker, WandB
from tests.tracking.reading import the_run


class Recorder:
    """A logger of a user, which keeps every call."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append(("metrics", metrics, step))

    def log_text(self, text, file):
        self.calls.append(("text", text, file))

    def log_file(self, file, folder=None):
        self.calls.append(("file", file, folder))

    def set_tags(self, tags):
        self.calls.append(("tags", tags))

    def close(self, status="FINISHED"):
        self.calls.append(("close", status))


def use(logger: Logger, file):
    logger.log_metrics({"loss/a": 1.5, "loss/b": float("nan")}, 3)
    logger.log_metrics({"loss/a": 2.5}, 1)
    logger.log_text("key: value\n", "config.yaml")
    logger.log_file(file, "kept")
    logger.set_tags({"loss_method": "uw"})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def text(read, name):
    return read.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("content", encoding="utf-8")
    return path


def test_several_loggers_are_one(file):
    first, second = Recorder(), Recorder()
    with pytest.raises(KeyboardInterrupt), Loggers([first, second]) as logger:
        use(logger, file)
        raise KeyboardInterrupt
    assert first.calls == second.calls
    assert [call[0] for call in first.calls] == ["metrics", "metrics", "text", "file", "tags", "close"]
    assert first.calls[-1] == ("close", "KILLED")


def test_all_loggers_are_closed_whatever_one_raises():
    broken, other = Recorder(), Recorder()
    broken.close = lambda status: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Loggers([other, broken]).close("FAILED")
    assert other.calls == [("close", "FAILED")]


def test_tensorboard_reads_what_was_recorded(tmp_path, file):
    pytest.importorskip("tensorboard")
    with Loggers([TensorBoard(tmp_path / "board")]) as logger:
        use(logger, file)
    logger.close()  # again
    read = events(tmp_path / "board")
    assert sorted((point.step, point.value) for point in read.Scalars("loss/a")) == [(1, 2.5), (3, 1.5)]
    assert "key: value" in text(read, "config.yaml")
    assert text(read, "kept/file.txt") == str(file)
    assert text(read, "tags/loss_method") == "uw"
    assert text(read, "tags/status") == "FINISHED"


def test_nothing_is_written_without_a_record(tmp_path):
    pytest.importorskip("tensorboard")
    TensorBoard(tmp_path / "board").close()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_is_a_logger_and_passes_everything_on(folder, file):
    recorder = Recorder()
    balancer = balance.Balancer(("a", "b"))
    with pytest.raises(RuntimeError), Tracker("problem", folder, balancer=balancer, seed=1, loggers=[recorder]) as tracker:
        use(tracker, file)
        raise RuntimeError
    assert the_run(folder).info.status == "FAILED"
    described, *others = recorder.calls
    assert described[1].items() >= {"loss_method": "ls", "seed": "1", "balancer.scale": "paper"}.items()
    assert [call[0] for call in others] == ["metrics", "metrics", "text", "file", "tags", "close"]
    assert others[-1] == ("close", "FAILED")


def test_loggers_record_without_mlflow_on_the_first_rank_only(tmp_path, monkeypatch):
    recorder = Recorder()
    with Tracker("problem", tmp_path, loggers=[recorder], enabled=False) as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
    assert ("metrics", {"a": 1.0}, 0) in recorder.calls
    monkeypatch.setenv("RANK", "1")
    other = Recorder()
    with Tracker("problem", tmp_path, loggers=[other], enabled=False) as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
    assert other.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_passes_only_new_metrics_on(folder):
    with Tracker("problem", folder) as tracker:
        tracker.log_metrics({"a": 1.0}, 0)
    recorder = Recorder()
    with Tracker("problem", folder, run_id=tracker.run_id, loggers=[recorder]) as again:
        again.skip_written()
        again.log_metrics({"a": 1.0, "b": 2.0}, 0)
    assert ("metrics", {"b": 2.0}, 0) in recorder.calls


def test_wandb_keeps_what_was_recorded(tmp_path, file, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandB("project", tmp_path / "here", mode="offline", name="first")
    with Loggers([logger]) as both:
        use(both, file)
        run = logger._run
        files = tmp_path / "here" / "wandb"
        assert run.config["loss_method"] == "uw"
        assert run.summary["loss/a"] == 2.5
    (kept,) = files.glob("offline-run-*/files/balance/kept/file.txt")
    assert kept.read_text(encoding="utf-8") == "content"
    (config,) = files.glob("offline-run-*/files/balance/config.yaml")
    assert config.read_text(encoding="utf-8") == "key: value\n"
    assert list(files.glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("make", "name"), [(TensorBoard, "tensorboard"), (WandB, "wandb")])
def test_a_missing_package_is_named_with_its_remedy(make, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is required.*pip install 'mtl-balance\[{name}\]'"):
        make("place")
