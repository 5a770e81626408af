"""Commands of all pages: every command is parsed by its program, and one of each kind runs, on little data."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from balance import __main__ as library
from balance import catalogue
from balance.diagnosis import measurement
from experiments import cli
from experiments.problems.base import find
from experiments.recording.fingerprint import fingerprint
from experiments.sweeps import console
from tests.commands import PAGES, ROOT, check, commands

COMMANDS = commands()
TINY_ROOMS = [f"data.num_{part}=4" for part in ("train", "validation", "test")] + [
    "data.cache=rooms",
    "train.epochs=1",
    "train.batch_size=2",
    "log_model=false",
]
TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1", "log_model=false"]
# One command of each kind, in an order in which a reader could give them; test_compare.py and test_front.py draw figures
RUN = (
    "python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad --seed=1",
    "python experiments/trainer.py --loss_method=famo train.epochs=5 loss.gamma=0.01 output_dir=runs/short",
    "python experiments/trainer.py --experiment=nyuv2 --loss_method=famo --gradient_method=cagrad",
    "python experiments/trainer.py --experiment=nyuv2 --list_settings",
    "python experiments/trainer.py --experiment=nyuv2 --gradient_method=cagrad --print_config",
    "python experiments/diagnose.py --experiment=digits",
    "python experiments/sweep.py --experiment=digits --loss_method=ls,uw --seeds=3",
    "python experiments/compare.py --experiment=digits --format=markdown --table_only",
    "python experiments/compare.py --experiment=nyuv2 --published --baselines=none",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        check(command)
    except (SystemExit, Exception) as error:  # noqa: BLE001 - the message names the page
        pytest.fail(f"{COMMANDS[command]}: {command}\n{error!r}")


@pytest.mark.parametrize(
    "command",
    [
        "python experiments/trainer.py train.epoch=3",
        "python experiments/trainer.py --loss_methods=uw",
        "python experiments/sweep.py --loss_method=uw,uww",
        "python experiments/sweep.py --file=experiments/problems/digits/method.yaml",
        "python experiments/compare.py --pareto=sum/mae,left/acc",
        "python experiments/compare.py train.epochs=few",
        "python -m balance methods upgradd",
        "python benchmarks/bench_nothing.py",
        "torchrun --nproc=2 experiments/trainer.py loss.gamma=1",
        "pip install -e . --group experiment",
        "pip install 'mtl-balance[comparison]'",
        "mlflow server --backend-store sqlite:///runs/mlflow.db",
        "make demos",
        "conda install balance",
    ],
)
def test_mistake_in_a_command_is_found(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, AssertionError, subprocess.CalledProcessError)):
        check(command)


def test_commands_are_found_on_the_pages():
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"README.md", "experiments/README.md", "docs/experiments/trainer.md"} <= pages
    assert COMMANDS.keys() >= {"make demo", "python -m balance methods NAME", *RUN}
    assert not [command for command in COMMANDS if command.startswith(("#", "$"))]


def test_demo_trains():
    command = ["make", "-n", "-W", "pyproject.toml", "demo"]
    demo = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad" in demo.stdout


def run(command, capfd):
    """Run a command on less data in this process, since a new process would take longer than the command."""
    program, script, *words = command.replace("--seeds=3", "--seeds=1").split()
    assert program == "python"
    shrink = TINY_ROOMS if "--experiment=nyuv2" in words else TINY
    shrink = {"experiments/sweep.py": [*shrink, "--jobs=1"], "experiments/compare.py": []}.get(script, shrink)
    shrink = [word for word in shrink if word.split("=")[0] not in {given.split("=")[0] for given in words}]
    shrink = [*shrink, "--table_only"] if "--published" in words else shrink
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    capfd.readouterr()
    assert main([*words, *shrink]) == 0
    return capfd.readouterr().out


def test_commands(tmp_path, monkeypatch, capfd, empty_database):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "runs", tmp_path / "runs/short"):
        folder.mkdir()
        shutil.copy(empty_database, folder)
    monkeypatch.setattr(console, "estimate_seconds", lambda configs, _: {fingerprint(config): 1.0 for config in configs})
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    printed = {command: run(command, capfd) for command in RUN}
    assert (tmp_path / "runs/digits").is_dir()
    assert (tmp_path / "runs/short/mlflow.db").exists()
    assert "Recommendation" in printed["python experiments/diagnose.py --experiment=digits"]
    assert any("6 runs finished, 0 failed" in text for command, text in printed.items() if "sweep.py" in command)
    assert any("| single-task networks |" in text for text in printed.values())


def test_methods_are_printed(monkeypatch, capfd):
    monkeypatch.setattr(catalogue, "cost_of", lambda kind, name: 1.0)
    for words, expected in ((["methods"], "aligned_mtl"), (["methods", "upgrad"], "dual cone")):
        assert library.main(words) == 0
        assert expected in capfd.readouterr().out


def test_the_table_is_in_the_form_that_compare_prints():
    text = (ROOT / "docs/experiments/results.md").read_text(encoding="utf-8")
    (header,) = [line for line in text.splitlines() if line.startswith("| method | seeds |")]
    experiment = find("digits")
    names = [f"{name} {'↑' if name in experiment.HIGHER_IS_BETTER else '↓'}" for name in experiment.metrics()]
    columns = ["method", "seeds", "delta\\_m % ↓", "95 % interval", "mean rank ↓", *names, "time / ls", "memory MiB"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == columns


def test_every_backend_has_a_command():
    backends = {found[1] for command in COMMANDS if (found := re.search(r"--backend=(\w+)", command))}
    assert backends == set(cli.BACKENDS) - {"loky"}


@pytest.mark.slow
def test_mlflow_ui(tmp_path, monkeypatch, capfd):
    (command,) = {command.removeprefix(".venv/bin/") for command in COMMANDS if "mlflow ui" in command}
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
