"""Runs of the problem ``metaworld``: resumed ones, wrong settings, the other commands, and the simulator itself."""

import importlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("gymnasium")

from experiments import compare, diagnose, sweep
from experiments.datasets.environments.points import Point
from experiments.datasets.environments.simulation import Simulation
from experiments.problems import base, metaworld
from experiments.problems.metaworld.data import DataConfig, World, environment_of
from experiments.sweeps.runtime import estimate_run
from experiments.training import loop
from experiments.training.checkpoint_files import load
from tests.experiments.short_runs import ROOT, configure, prepare, run_in, train
from tests.experiments.training.interruptions import interrupt, raise_killed, send

RUN = [
    "agent.epoch_steps=8",
    "train.epochs=3",
    "train.report_last=2",
    "data.goals=3",
    "data.evaluation_goals=2",
    "log_model=false",
]


class Runs:
    """Runs with the same configuration in one folder."""

    def __init__(self, words, folder):
        self.words = [*words, *RUN, f"output_dir={folder}", "resume=true"]
        self.folder = folder / "metaworld"

    def train(self, *words):
        final = train(*self.words, *words)
        (folder,) = self.folder.iterdir()
        return final, load(folder / "last.pt")


def assert_equal(ours, theirs):
    """Checkpoints are equal bit for bit, except for costs, and for generators that nothing seeds or uses."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"costs", "python", "numpy"}:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    else:
        assert ours == theirs


# Resuming

CASES = [
    pytest.param(["--loss_method=famo"], id="famo"),
    pytest.param(["--loss_method=uw", "--gradient_method=pcgrad", "agent.balanced=[actor,temperature]"], id="balanced actor"),
    pytest.param(["agent.sampling=mixed", "agent.first_updates=9"], id="as published"),
    pytest.param(["data.processes=true", "agent.replay_size=14"], id="processes and full buffers"),
]


@pytest.mark.parametrize("words", CASES)
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(words, tiny, tmp_path):
    undisturbed, disturbed = (Runs(tiny("metaworld", *words), tmp_path / name) for name in ("one", "two"))
    final, state = undisturbed.train()
    always = "train.checkpoint_minutes=1e-9"
    for step in (3, 8, 6):  # in the middle of an episode, after an evaluation, and within the last epoch
        interrupt(disturbed, loop, "train_step", step, raise_killed, always)
    interrupt(disturbed, loop, "train_step", 2, send(signal.SIGTERM))
    resumed, resumed_state = disturbed.train()
    assert resumed == final
    assert_equal(resumed_state, state)
    assert state["step"] == 24
    assert len(state["history"]) == 3


def test_a_run_that_is_interrupted_in_an_evaluation_resumes(tiny, tmp_path):
    runs = Runs(tiny("metaworld"), tmp_path / "two")
    final, state = Runs(tiny("metaworld"), tmp_path / "one").train()
    interrupt(runs, metaworld.agent.Collection, "try_goal", 3, send(signal.SIGINT))
    (folder,) = runs.folder.iterdir()
    last = load(folder / "last.pt")
    assert (last["epoch"], last["position"]) == (1, 8)
    resumed, resumed_state = runs.train()
    assert resumed == final
    assert_equal(resumed_state, state)


def test_environments_of_another_version_are_refused(tiny, tmp_path, monkeypatch):
    runs = Runs(tiny("metaworld"), tmp_path)
    interrupt(runs, loop, "train_step", 3, raise_killed, "train.checkpoint_minutes=1e-9")
    observe = Point.observe
    monkeypatch.setattr(Point, "observe", lambda point: observe(point) + np.float32(1e-3))
    with pytest.raises(RuntimeError, match="the environments took another course"):
        runs.train()


# Learning, records, other commands


@pytest.mark.slow
def test_points_are_learned():
    words = ["data.source=points", "data.tasks=all", "data.processes=false", "data.episode_steps=30", "agent.epoch_steps=200"]
    sizes = ["agent.random_steps=200", "train.batch_size=64", "model.width=32", "train.epochs=5", "train.report_last=1"]
    final = train("--experiment=metaworld", *words, *sizes, "--gradient_method=pcgrad", "track=false")
    assert final["all/success"] >= 0.75


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow")
def test_the_policy_is_recorded_and_served(tiny, tmp_path):
    words = tiny("metaworld", "--loss_method=famo", "track=true", "log_every=1", "data.episode_steps=2")
    run = prepare(*words, console=Console(width=120, record=True, file=io.StringIO()))
    loop.train(run)
    recorded, client = run_in(tmp_path, "metaworld")
    names = recorded.data.metrics.keys()
    assert {f"{kind}/{task}" for kind in ("loss", "weight", "temperature") for task in ("east", "north")} <= names
    assert {f"episode/{task}/{result}" for task in ("east", "north") for result in ("success", "return")} <= names
    assert {"final/all/success", "final/all/area", "final/east/success", "val/north/success", "cost/step_ms"} <= names
    assert "all" in run.console.export_text()
    (logged,) = client.search_logged_models([recorded.info.experiment_id])
    served = mlflow.pyfunc.load_model(logged.artifact_location)
    rows = run.agent.policy()[1].numpy()
    expected = run.model.actor(torch.from_numpy(rows))["action"].detach().numpy()
    np.testing.assert_allclose(served.predict(rows)["action"], expected, rtol=1e-6)
    assert client.list_artifacts(recorded.info.run_id, "checkpoints")


def test_progress_shows_the_speed(tiny):
    console = Console(width=150, record=True, file=io.StringIO(), force_terminal=True)
    loop.train(prepare(*tiny("metaworld", "agent.epoch_steps=20"), console=console))
    assert "steps/s" in console.file.getvalue()


def test_a_sweep_is_compared_by_the_rate_of_success_of_all_tasks(tiny, tmp_path, capsys):
    words = [word for word in tiny("metaworld") if word not in ("track=false", f"output_dir={tmp_path}/runs")]
    options = ["--loss_method=ls,famo", "--seeds=2", "--jobs=2", f"--output_dir={tmp_path}", "log_model=false", *words]
    options.append("data.processes=true")  # within the processes of the sweep
    assert sweep.main(options) == 0
    capsys.readouterr()
    assert compare.main(["--experiment=metaworld", f"--output_dir={tmp_path}", "--format=json"]) == 0
    table = json.loads(capsys.readouterr().out)
    names = [metric["name"] for metric in table["metrics"]]
    assert names[:3] == ["all/success", "east/success", "north/success"]
    assert all(metric["higher_is_better"] for metric in table["metrics"])
    means = [row["metrics"]["all/success"]["mean"] for row in table["rows"]]
    assert means == sorted(means, reverse=True)
    assert all(row["metrics"]["all/success"]["low"] is not None for row in table["rows"])
    assert {row["delta_m"] for row in table["rows"]} == {None}


def test_a_diagnosis_and_an_estimate_of_a_run(tiny, capsys):
    words = [word for word in tiny("metaworld") if not word.startswith(("output_dir", "track"))]
    assert diagnose.main([*words, "--batches=2", "--steps=2", "agent.epoch_steps=20"]) == 0
    assert "east" in capsys.readouterr().out
    assert estimate_run(configure(*tiny("metaworld"))) > 0


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.batch_size=1"], r"train\.batch_size must be at least 2, one for each task, but got 1"),
        (["agent.replay_size=1"], r"agent\.replay_size must be at least 2, one for each task, but got 1"),
        (["data.tasks=east,reach"], r"Unknown task of data\.source=points 'reach'\. Known: all, east, north, south, west"),
        (["data.tasks=east,east"], r"data\.tasks must name each task once, but got 'east,east'"),
        (["data.evaluation_goals=2"], r"data\.evaluation_goals must be at most data\.goals=1, but got 2"),
        (["agent.discount=1.5"], r"agent\.discount must be at least 0 and at most 1, but got 1\.5"),
        (["agent.balanced=[critic]"], r"agent\.balanced must be one of actor, temperature"),
        (["model.width=0"], r"model\.width must be at least 1"),
        (["train.lbfgs_steps=2"], r"collects its own batches in one process, but got train\.lbfgs_steps=2"),
        (["--loss_method=stl"], r"but got loss_method=stl; a run of one task needs data\.tasks=NAME"),
        (["balancer.source=features", "--gradient_method=pcgrad"], r"but got balancer\.source=features, where the tasks"),
        (["model.source=metaworld"], r"model\.source must equal data\.source=points, but got metaworld"),
        (["train.num_workers=2"], r"but got train\.num_workers=2"),
        (["--loss_method=coba"], r"but got loss_method=coba, which learns from validation losses"),
    ],
)
def test_mistakes_are_refused(words, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(*tiny("metaworld", *words))
    assert not (tmp_path / "runs").exists()


def test_without_its_libraries_a_message_says_what_to_install(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gymnasium" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"'metaworld' needs gymnasium: pip install -e \. --group rl\."):
        importlib.reload(metaworld)
    monkeypatch.undo()
    importlib.reload(metaworld)
    monkeypatch.setitem(sys.modules, "experiments.datasets.environments.manipulation", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs .*: pip install -e \. --group rl, or set data\.source=points"):
        environment_of("metaworld")


def test_the_published_tasks_are_chosen_together():
    assert base.with_tasks(base.find("metaworld"), DataConfig()).TASKS == metaworld.TASKS
    assert len(base.tasks_of(configure("--experiment=metaworld", "protocol=paper"))) == 10


# Processes, and the simulator


def test_processes_give_the_transitions_of_one_process():
    outcomes = []
    for processes in (False, True):
        world = World(DataConfig(source="points", tasks="all", goals=4, processes=processes))
        observations = world.simulation.begin([0, 1, 2, 3])
        actions = np.random.default_rng(0).uniform(-1, 1, (6, 4, 2)).astype(np.float32)
        outcomes.append([observations, *(part for action in actions for part in world.simulation.step(action))])
        world.close()
        world.close()
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_a_process_that_has_ended_is_named():
    world = World(DataConfig(source="points", tasks="all"))
    world.simulation.begin([0] * 4)
    world.simulation.vector.processes[1].kill()
    world.simulation.vector.processes[1].join()
    with pytest.raises(RuntimeError, match=r"must have its process, but one has ended.* resume=true continues"):
        for _ in range(3):
            world.simulation.step(np.zeros((4, 2), np.float32))
    processes = world.simulation.vector.processes
    world.close()
    for process in processes:
        process.join(timeout=10)
        assert not process.is_alive()


def test_a_signal_to_all_processes_leaves_a_run_that_resumes(tiny, tmp_path):
    """Schedulers send SIGTERM to a whole group, and terminals send Ctrl-C to it."""
    words = [word for word in tiny("metaworld") if word != "data.processes=false"]
    sizes = ["agent.epoch_steps=100000", "train.checkpoint_minutes=0.01", "train.threads=1"]
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), *words, *sizes]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob("runs/metaworld/*/last.pt")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "Traceback" not in told
    (file,) = tmp_path.glob("runs/metaworld/*/last.pt")
    assert load(file)["step"] > 0


def test_goals_follow_from_the_seed():
    first, again, other = (Point("east", 0, 3, seed).goals for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    np.testing.assert_array_equal(Point("east", 0, 1, 0).goals, first[:1])


@pytest.fixture(scope="module")
def robot():
    pytest.importorskip("metaworld")
    from experiments.datasets.environments.manipulation import Manipulation

    tasks = ("reach", "drawer-close")
    simulation = Simulation([partial(Manipulation, task, k, 2, 0) for k, task in enumerate(tasks)], processes=False)
    yield simulation
    simulation.close()


def test_an_episode_of_the_robot_is_repeated_exactly(robot):
    """Also after another goal and other actions, and in the middle of an episode."""
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 30, 2, 4)).astype(np.float32)
    robot.begin([1, 0])
    for action in actions[0]:
        outcome = robot.step(action)
    goals, taken = robot.state()
    other = robot.begin([0, 1])
    for action in actions[1]:
        robot.step(action)
    assert (other[0, -3:] != outcome.observations[0, -3:]).any()  # another goal of reach
    np.testing.assert_array_equal(robot.resume(goals, taken), outcome.observations)
    again = robot.step(actions[1][0])
    robot.resume(goals, taken)
    for ours, theirs in zip(robot.step(actions[1][0]), again, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_robot_closes_a_drawer(robot):
    """A hand-written policy succeeds, so that success is what the simulator reports."""
    observations = robot.begin([0, 0])
    successes = np.zeros(2)
    for _ in range(150):
        gripper, handle = observations[1, :3], observations[1, 4:7]
        behind = handle + np.array([0, -0.1, 0.02])  # in front of the drawer, from where it is pushed
        target = (
            behind if gripper[1] < handle[1] - 0.05 and gripper[2] > handle[2] + 0.08 else handle + np.array([0, 0.1, 0.02])
        )
        actions = np.zeros((2, 4), np.float32)
        actions[1, :3] = np.clip(10 * (target - gripper), -1, 1)
        outcome = robot.step(actions)
        observations, successes = outcome.observations, np.maximum(successes, outcome.successes)
    assert successes[1] == 1
    assert outcome.rewards.shape == (2,)


@pytest.mark.slow
def test_a_killed_run_with_the_robot_resumes_and_leaves_no_process(tmp_path):
    pytest.importorskip("metaworld")
    sizes = [
        "train.epochs=2",
        "agent.epoch_steps=300",
        "agent.random_steps=200",
        "train.report_last=1",
        "data.tasks=reach,push",
    ]
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "--experiment=metaworld", *sizes]
    command += ["data.tasks=reach,push", "track=false"]
    finals = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        words = [*command, "train.checkpoint_minutes=0.02", f"output_dir={folder}", "resume=true"]
        if name == "killed":
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and not list(folder.glob("metaworld/*/previous.pt")):
                time.sleep(0.1)
            children = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(5)
            assert not [child for child in children if Path(f"/proc/{child}").exists()]
        subprocess.run(words, check=True, capture_output=True)
        (file,) = folder.glob("metaworld/*/final.json")
        finals.append((json.loads(file.read_text()), load(file.parent / "last.pt")))
    assert finals[0][0] == finals[1][0]
    assert_equal(finals[0][1], finals[1][1])
