"""The command front.py: a fan of short runs, its table, figure and numbers, and refused options."""

import json

import pytest

from experiments import front
from experiments.sweeps import runtime
from tests.experiments.sweeps.small_sweeps import TINY

FAN = ["--loss_method=ls,pbi", "--points=2", "--seeds=2", "--jobs=1", *TINY]


@pytest.fixture(autouse=True)
def quick_estimates(monkeypatch):
    monkeypatch.setattr(runtime, "BUDGET", 0.01)


@pytest.mark.slow
def test_a_fan_of_two_methods(tmp_path, capfd):
    assert front.main([*FAN, f"--output_dir={tmp_path}"]) == 0
    printed = capfd.readouterr().out
    assert "hypervolume" in printed
    folder = tmp_path / "digits" / "front"
    assert (folder / "front.png").stat().st_size > 10_000
    assert (folder / "front.pdf").exists()
    content = json.loads((folder / "front.json").read_text())
    assert content["costs"] == ["1 - left/accuracy", "1 - right/accuracy"]
    assert set(content["fronts"]) == {"ls", "pbi"}
    for made in content["fronts"].values():
        assert [point["preference"] for point in made["points"]] == [0.25, 0.75]
        assert all(0 <= cost <= 1 for point in made["points"] for cost in point["costs"])
    assert front.main([*FAN, f"--output_dir={tmp_path}", "--reference=1,1"]) == 0  # nothing is trained again
    assert "0 runs to do" in capfd.readouterr().out
    assert json.loads((folder / "front.json").read_text())["reference"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks=left"], "--tasks must be two values"),
        (["--tasks=left,up"], "Unknown task in --tasks 'up'"),
        (["--metrics=left/accuracy,right/mae"], "--metrics must be two of"),
        (["--points=1"], "--points must be at least 2"),
        (["--reference=1"], "--reference must be two values"),
        (["--loss_method=lss"], "Did you mean 'ls'"),
    ],
)
def test_mistakes(words, message, tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        front.main([*words, f"--output_dir={tmp_path}"])
    assert message in capfd.readouterr().err
