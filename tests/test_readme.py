"""Commands of the README are run; its snippets are run by conftest.py."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from balance import catalogue
from balance.diagnosis import measurement
from experiments import sweep
from experiments.problems.base import find
from experiments.sweeps import runtime as estimate

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
SMALL = {
    "experiments/problems/toy/__main__.py": ["--steps=20"],
    "experiments/front.py": ["train.batch_size=5385", "model.width=2", "train.epochs=1", "log_model=false", "--jobs=1"],
    "balance/__main__.py": [],
}
TINY_ROOMS = [f"data.num_{part}=4" for part in ("train", "validation", "test")] + [
    "data.cache=rooms",
    "train.epochs=1",
    "train.batch_size=2",
    "log_model=false",
]
TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1", "log_model=false"]


def test_make_targets():
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    demo = subprocess.run(["make", "-n", "-W", "pyproject.toml", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad" in demo.stdout


def run(command, capfd):
    """The command on less data, in this process, since starting one takes longer than all that it does."""
    program, script, *words = command.replace("--seeds=3", "--seeds=1").split()
    assert program == "python"
    words = [word.replace("--points=5", "--points=2").replace("ls,pbi", "pbi") for word in words]
    if script == "-m":
        script = f"{words.pop(0).replace('.', '/')}/__main__.py"
    assert (ROOT / script).exists()
    shrink = SMALL.get(script, TINY_ROOMS if "--experiment=nyuv2" in words else TINY) + (
        ["--jobs=1"] if "sweep" in script else []
    )
    shrink = [] if "--help" in words or "compare" in script else shrink
    shrink = [word for word in shrink if word.split("=")[0] not in {given.split("=")[0] for given in words}]
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    capfd.readouterr()
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    else:
        assert main([*words, *shrink]) == 0
    return capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
def test_commands(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "BUDGET", 0.01)
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    scripts = [command for command in COMMANDS if command.startswith("python ") and "--backend=" not in command]
    assert len(scripts) == 13
    monkeypatch.setattr(catalogue, "cost_of", lambda kind, name: 1.0)
    printed = {command: run(command, capfd) for command in scripts}
    assert (tmp_path / "runs/digits").is_dir()
    assert (tmp_path / "runs/short/mlflow.db").exists()
    assert "Recommendation" in printed["python experiments/diagnose.py --experiment=digits"]
    assert any("16 runs finished, 0 failed" in text for command, text in printed.items() if "sweep.py" in command)
    assert (tmp_path / "runs/digits/comparison/report.html").exists()


def test_the_table_is_in_the_form_that_compare_prints():
    (header,) = [line for line in TEXT.splitlines() if line.startswith("| method | seeds |")]
    experiment = find("digits")
    names = [f"{name} {'↑' if name in experiment.HIGHER_IS_BETTER else '↓'}" for name in experiment.metrics()]
    columns = ["method", "seeds", "delta\\_m % ↓", "95 % interval", "mean rank ↓", *names, "time / ls", "memory MiB"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == columns


def test_commands_for_clusters_are_those_of_the_parser():
    commands = [command for command in COMMANDS if "--backend=" in command]
    assert {re.search(r"--backend=(\w+)", command).group(1) for command in commands} == set(sweep.BACKENDS) - {"loky"}
    for command in commands:
        sweep.build_parser().parse_intermixed_args(command.split()[2:])


def test_every_command_is_covered():
    """Commands for clusters and servers are started in test_sweep.py and test_server.py."""
    known = ("make", "python", ".venv/bin/mlflow", "ray", "dask", "mlflow", "export")
    assert all(command.split()[0] in known for command in COMMANDS)


@pytest.mark.slow
def test_mlflow_ui(tmp_path, monkeypatch, capfd):
    (command,) = [command for command in COMMANDS if command.startswith(".venv/bin/mlflow")]
    words = command.split()[1:]
    monkeypatch.chdir(tmp_path)
    run(f"python experiments/trainer.py {' '.join(TINY)}", capfd)
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--port", "5071"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen("http://127.0.0.1:5071/", timeout=2) as page:
                    assert page.status == 200
                    return
            except OSError:
                assert server.poll() is None, "the server has ended"
        pytest.fail("the server does not answer")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=20)


def test_tables_and_figure_of_benchmarks_are_the_recorded_ones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from show import rules_table, steps_table

    newest = max((ROOT / "benchmarks/results").glob("*_rules_*.json"))
    assert rules_table(json.loads(newest.read_text("utf-8"))["results"]) in TEXT
    figure = ROOT / re.search(r"\((benchmarks/results/\S+_jacobian_\S+\.png)\)", TEXT)[1]
    assert figure.exists()
    recorded = json.loads(figure.with_suffix(".json").read_text("utf-8"))["results"]
    assert steps_table(recorded, 11) in TEXT
