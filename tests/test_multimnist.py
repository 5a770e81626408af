import json

import numpy as np
import pytest

from balance import Balancer
from experiments.problems.multimnist import TASKS, DataConfig, build_model, load, losses
from experiments.problems.multimnist.__main__ import main
from experiments.problems.multimnist.comparison import CONFIGURATIONS, RunningMeans, Settings, compare, rate, summary, train
from tests.writers.mnist import write_mnist


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path / "mnist")
    return tmp_path / "mnist"


@pytest.fixture(scope="module")
def batch():
    return load(DataConfig()).train[list(range(64))]


def test_learning_rate_rises_for_an_epoch_and_falls_later():
    assert [rate(step, 4, 3) for step in (0, 1, 3, 4, 11, 12, 99)] == [0, 0.25, 0.75, 1, 1, 0.1, 0.1]


def test_running_means():
    means = RunningMeans()
    means.update([2.0, 0.0])
    assert means.values == [2, 0]
    means.update([1.0, 1.0])
    assert means.values == pytest.approx([1.99, 0.01])


@pytest.mark.parametrize(("name", "task", "other"), [("single-left", "left", "right"), ("single-right", "right", "left")])
def test_single_task_trains_one_head(batch, name, task, other):
    configuration = CONFIGURATIONS[name]
    model = build_model()
    Balancer(TASKS, configuration.loss, loss_options=configuration.loss_options).backward(losses(model(batch[0]), batch))
    assert model.heads.of_task[other].weight.grad.abs().max() == 0
    assert model.heads.of_task[task].weight.grad.abs().max() > 0
    assert configuration.trained == (task,)


def test_only_trained_tasks_are_in_the_summary(mnist):
    settings = Settings(epochs=1, batch_size=25, data=DataConfig("mnist", str(mnist)))
    data = load(settings.data)
    results = [train(name, 1.0, 0, settings, data) for name in ("single-right", "summed-loss")]
    assert summary(results).keys() == {
        (name, 1.0, t) for name, t in (("single-right", "right"), ("summed-loss", "left"), ("summed-loss", "right"))
    }


def test_the_comparison_from_the_command_line(mnist, tmp_path, capsys):
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--epochs",
        "2",
        "--seeds",
        "2",
        "--data_path",
        str(mnist),
        "--batch_size",
        "20",
    ]
    names = ("summed-loss", "single-right", "pcgrad", "normalized-project3")
    assert main([*arguments, "--configurations", *names]) == 0
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "comparison.pdf").read_bytes()[:4] == b"%PDF"
    assert len(list(tmp_path.glob("out/*.json"))) == 16
    saved = json.loads((tmp_path / "out" / "pcgrad_imbalance1000_seed1.json").read_text(encoding="utf-8"))
    assert saved["settings"]["data"]["path"] == str(mnist)
    assert saved["settings"]["batch_size"] == 20
    assert (saved["configuration"], saved["imbalance"], saved["seed"]) == ("pcgrad", 1000, 1)
    for task in ("left", "right"):
        assert len(saved["train_loss"][task]) == len(saved["validation_accuracy"][task]) == 2
        assert 0 <= saved["test_accuracy"][task] <= 1
        assert 0 < saved["train_loss"][task][-1] < 10  # without the imbalance
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_which_epoch_is_tested(mnist):
    """The best on validation; the last where the test pairs are for validation, as published."""
    for protocol in ("sound", "paper"):
        settings = Settings(epochs=3, batch_size=25, lr=0.01, data=DataConfig("mnist", str(mnist), protocol))
        result = train("summed-loss", 1.0, 0, settings, load(settings.data))
        means = np.mean(list(result.validation_accuracy.values()), axis=0)
        assert result.epoch == (3 if protocol == "paper" else 1 + means.argmax())
    assert result.test_accuracy == {task: values[-1] for task, values in result.validation_accuracy.items()}
    assert result.test_loss == {task: values[-1] for task, values in result.validation_loss.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configurations", "summed"], "Did you mean 'summed-loss'"),
        (["--epochs", "0"], "must be at least 1, but got 1, 0 and 64"),
        (["--data_path", "/nowhere"], "train-images-idx3-ubyte"),
        (["--protocol", "paper"], "protocol must be sound for scikit-learn's digits"),
    ],
)
def test_mistakes_in_the_command(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_imbalance_ruins_the_small_loss_unless_a_splitter_normalises(tmp_path):
    results = compare(["summed-loss", "normalized-splitter"], 1, Settings(epochs=3), tmp_path, imbalances=(1000.0,))
    found = {key: value[0] for key, value in summary(results).items()}
    assert found["summed-loss", 1000.0, "left"] < 0.6
    assert found["normalized-splitter", 1000.0, "left"] > 0.9
    assert min(found[name, 1000.0, "right"] for name in ("summed-loss", "normalized-splitter")) > 0.9
