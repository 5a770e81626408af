import json
import re
import shlex
import subprocess
import sys

import pytest

from balance import loss_balancers
from balance.diagnosis import measurement
from experiments import diagnose as script
from experiments.training.run import build
from tests.diagnosis.problems import Meter
from tests.experiments.short_runs import ROOT, configure

TINY = ["data.train_pairs=256", "data.validation_pairs=100", "data.test_pairs=100"]
QUICK = [*TINY, "--batches=3", "--steps=2"]


@pytest.fixture(autouse=True)
def one_step(monkeypatch):
    """One step of each method, which is not timed."""
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    monkeypatch.setattr(measurement, "measure_cost", Meter())


def test_the_script_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*QUICK, "--seed=4"]) == 0
    printed = capsys.readouterr().out
    assert "digits, seed 4" in printed
    assert "4 tasks on 23296 shared parameters, seen on 3 batches" in printed
    program, path, *words = shlex.split(printed.splitlines()[-1])
    assert (program, path) == ("python", "experiments/sweep.py")
    assert words[0] == "--experiment=digits"
    flag, _, methods = words[1].partition("=")
    against_scale = {name for name in loss_balancers.names() if "loss scale" in loss_balancers.traits(name).remedies}
    assert flag == "--loss_method"
    assert methods.split(",")[0] == "ls"
    assert len(methods.split(",")) > 1  # the losses of digits differ by hundreds
    assert against_scale.issuperset(methods.split(",")[1:4])
    assert re.fullmatch(r"--gradient_method=none(,\w+)*", words[2])
    assert words[3:] == ["--seeds=3", *TINY]
    assert list(tmp_path.iterdir()) == []


def test_the_script_as_json_sees_what_the_trainer_begins_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*QUICK, "--format=json", "seed=2", "train.batch_size=32", "train.lr=0.01"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["experiment"], numbers["seed"], numbers["lr"]) == ("digits", 2, 0.01)
    assert numbers["command"].endswith(f"--seeds=3 {' '.join(TINY)} train.batch_size=32 train.lr=0.01")
    words = [*TINY, "--seed=2", "train.batch_size=32"]
    run = build(configure(*words))
    firsts = [batch for batch, _ in zip(run.batches, range(3), strict=False)]
    losses = [run.problem.losses(run.model(batch[0]), batch)["left"].item() for batch in firsts]
    assert numbers["start"]["loss_median"]["left"] == pytest.approx(sorted(losses)[1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment=digit"], "Did you mean 'digits'?"),
        (["train.epoch=3"], "Did you mean 'train.epochs'?"),
        (["--seed=one"], "does not fit 'seed'"),
        (["--batches=1"], "num_batches must be an int, at least 2"),
        (["--batches=few"], "invalid int value: 'few'"),
        (["--steps=0"], "steps must be an int, at least 1"),
        (["--format=xml"], "invalid choice: 'xml'"),
        (["device=gpu"], "Device 'gpu' is not available"),
        (["train.batch_size=256", *TINY], "batches must contain at least two"),
        (["--loss_method=uw"], "unrecognized arguments: --loss_method=uw"),
        (["batches"], "must read key=value"),
    ],
)
def test_mistakes_of_the_command_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_has_an_example_that_runs(tmp_path, monkeypatch, capsys):
    command = [sys.executable, str(ROOT / "experiments/diagnose.py"), "--help"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    program, path, *words = shlex.split(text.split("example:")[1])
    assert (program, path) == ("python", "experiments/diagnose.py")
    monkeypatch.chdir(tmp_path)
    assert script.main([*words, *TINY, "--steps=2"]) == 0
    assert "digits, seed 0" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
