"""The command sweep.py: its plan, parallel runs, resumption after any interruption, and refused options."""

import shutil

import pytest
import torch
import yaml

from balance.comparison.store import Store
from experiments import baselines, sweep
from experiments.sweeps import runtime
from experiments.training import loop
from experiments.training.costs import Costs
from tests.experiments.sweeps.small_sweeps import GRID, TINY, markdown, recorded, without_costs


def without_measurements(patch):
    """Leave out times and memory, whose measurement takes longer than a small run."""
    patch.setattr(runtime, "BUDGET", 0.01)
    patch.setattr(Costs, "measure_memory", lambda costs, step, device: step())


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    without_measurements(monkeypatch)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small sweep in this process."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        without_measurements(patch)
        assert sweep.main([*GRID, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def again(swept, tmp_path):
    """A copy of the small sweep, which a test may change."""
    shutil.copy(swept / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path


def test_one_parent_and_a_child_for_each_run_and_baseline(swept):
    (parent,), _ = recorded(swept, "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"
    children, _ = recorded(swept, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    done = {
        (r.data.tags["kind"], r.data.tags["loss_method"], r.data.tags["gradient_method"], r.data.tags["seed"]) for r in children
    }
    grid = {("run", loss, gradient, seed) for loss in ("ls", "uw") for gradient in ("none", "pcgrad") for seed in "01"}
    assert done == grid | {("baseline", "stl", "none", seed) for seed in "01"}
    assert len(children) == 8 + 4 * 2
    assert {r.info.status for r in children} == {"FINISHED"}
    assert parent.data.metrics == {"runs/finished": 16, "runs/failed": 0}


def test_the_number_of_threads_is_as_before(tmp_path):
    before = torch.get_num_threads()
    assert before == 1
    assert sweep.main(["--loss_method=ls", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 0
    assert torch.get_num_threads() == before


def test_finished_runs_are_not_repeated(again, capfd, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a finished run was repeated"))
    assert sweep.main([*GRID, f"--output_dir={again}"]) == 0
    assert "0 runs to do, 16 are finished already" in capfd.readouterr().out
    assert len(recorded(again, "tags.kind = 'sweep'")[0]) == 1


def test_one_more_seed_and_method_run_only_new_runs(again, capfd):
    words = ["--loss_method=ls,rlw", "--gradient_method=none", "--seeds=0,2", "--jobs=1", "--dry_run", *TINY]
    assert sweep.main([*words, f"--output_dir={again}"]) == 0
    out = capfd.readouterr().out
    assert "7 runs to do, 5 are finished already" in out  # ls with seed 0, and four baselines
    assert "stl right" in out
    assert len(recorded(again)[0]) == 17


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_and_ends_like_an_undisturbed_one(swept, tmp_path, capfd, monkeypatch):
    shutil.copy(swept / "mlflow.db", tmp_path / "mlflow.db")
    for run in recorded(tmp_path)[0]:
        recorded(tmp_path)[1].delete_run(run.info.run_id)
    train = loop.train

    def cut_off(run, parent):
        if run.config.loss_method == "uw":
            raise KeyboardInterrupt
        return train(run, parent)

    monkeypatch.setattr(loop, "train", cut_off)
    command = [*GRID, f"--output_dir={tmp_path}"]
    assert sweep.main(command) == 130
    assert "resumes from here" in capfd.readouterr().out
    assert [run.info.status for run in recorded(tmp_path, "tags.kind = 'sweep'")[0]] == ["KILLED"]
    finished = {run.info.run_id for run in recorded(tmp_path, "attributes.status = 'FINISHED'")[0]}
    assert len(finished) == 12
    monkeypatch.setattr(loop, "train", train)
    assert sweep.main(command) == 0
    assert "4 runs finished, 0 failed, 12 were finished before" in capfd.readouterr().out
    (parent,), _ = recorded(tmp_path, "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"
    assert without_costs(markdown(tmp_path, capfd)) == without_costs(markdown(swept, capfd))


def test_names_in_a_sweep_file_are_recorded_with_finished_runs(again, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a finished run was repeated"))
    file = tmp_path / "names.yaml"
    configurations = {"equal weights": {}, "surgery": {"gradient_method": "pcgrad"}}
    file.write_text(yaml.safe_dump({"seeds": 2, "overrides": TINY, "configurations": configurations}), encoding="utf-8")
    assert sweep.main([f"--file={file}", "--jobs=1", f"--output_dir={again}"]) == 0
    assert "0 runs to do, 12 are finished already" in capfd.readouterr().out
    table = without_costs(markdown(again, capfd))
    assert {"equal weights", "surgery", "uw", "uw + pcgrad"} < set(table)
    assert not {"ls", "ls + pcgrad"} & set(table)


def test_a_failed_run_does_not_end_the_sweep_and_is_repeated_by_the_next(again, capfd, monkeypatch):
    train = loop.train
    broken = [True]

    def fails(run, parent):
        if broken[0] and run.config.seed == 0:
            raise ZeroDivisionError("a division by zero")
        return train(run, parent)

    monkeypatch.setattr(loop, "train", fails)
    command = ["--loss_method=rlw", "--seeds=2", "--jobs=1", *TINY, f"--output_dir={again}"]
    assert sweep.main(command) == 1
    out = capfd.readouterr().out
    assert "1 runs finished, 1 failed" in out
    assert "failed: loss_method=rlw gradient_method=none seed=0" in out
    assert "ZeroDivisionError: a division by zero" in out
    parents, _ = recorded(again, "tags.kind = 'sweep'")
    assert parents[0].info.status == "FAILED"
    broken[0] = False
    assert sweep.main(command) == 0
    assert "1 runs finished, 0 failed" in capfd.readouterr().out
    assert len(recorded(again, "tags.kind = 'sweep'")[0]) == 2


def test_a_method_that_fails_while_it_is_timed_does_not_end_the_plan(tmp_path, capfd, monkeypatch):
    step = loop.train_step

    def fails(run, *arguments):
        if run.config.loss_method == "uw":
            raise ValueError("its first step fails")
        return step(run, *arguments)

    for module in (runtime, loop):
        monkeypatch.setattr(module, "train_step", fails)
    words = ["--loss_method=ls,uw", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 1
    out = capfd.readouterr().out
    assert "5 runs finished, 1 failed" in out
    assert "ValueError: its first step fails" in out


def test_ctrl_c_while_the_plan_is_timed(tmp_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "estimate_run", interrupted)
    assert sweep.main(["--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 130
    assert "resumes from here" in capfd.readouterr().out


def test_without_tracking_everything_runs(tmp_path, capfd):
    assert sweep.main(["--loss_method=uw", "--jobs=1", *TINY, "track=false", f"--output_dir={tmp_path}"]) == 0
    assert "5 runs finished" in capfd.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()


def test_the_shipped_baselines_are_not_measured_again(tmp_path, capfd):
    assert sweep.main(["--loss_method=uw", "--jobs=1", "--dry_run", f"--output_dir={tmp_path}"]) == 0
    out = capfd.readouterr().out
    assert "1 runs to do" in out
    assert "stl" not in out
    assert list(tmp_path.iterdir()) == []  # a plan writes nothing


def test_plan_notes_pairings_without_effect(tmp_path, capfd):
    words = ["--loss_method=ls,uw", "--gradient_method=nashmtl", "--jobs=1", "--dry_run", *TINY, f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 0
    assert "note: nashmtl ignores positive loss weights: uw has no effect." in capfd.readouterr().out


def test_chains_and_options_of_a_method(tmp_path, capfd):
    words = ["--loss_method=scaleinvls+rlw", "loss.rlw.scale=4", "--jobs=1", "--dry_run", *TINY, f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 0
    assert "scaleinvls+rlw" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_method=ls,mgda"], "Unknown loss balancer 'mgda'"),
        (["--gradient_method=none,pcgard"], "Did you mean 'pcgrad'?"),
        (["--experiment=digit"], "Did you mean 'digits'?"),
        (["--loss_method=ls,ls"], "must contain each name once"),
        (["--seeds=0"], "--seeds must be how many"),
        (["--seeds=two"], "--seeds must be how many"),
        (["--seeds=1,1"], "must differ"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["--backend=mpi"], "invalid choice: 'mpi'"),
        (["--cluster=tcp://host:1"], "--cluster needs --backend"),
        (["seed=1"], "Use --seeds"),
        (["loss_method=uw"], "Use --loss_method"),
        (["train.epoch=1"], "Unknown key 'train.epoch'"),
        (["epochs"], "must read key=value"),
        (["--loss_method=go4align", "loss.num_groups=0"], "at least 1"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--help"])
    assert caught.value.code == 0
    assert "example:\n  python experiments/sweep.py --experiment=digits" in capsys.readouterr().out


def test_baselines_are_written_from_the_runs(again, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a finished run was repeated"))
    file = tmp_path / "baselines.yaml"
    assert baselines.main(["--seeds=2", "--jobs=1", f"--output={file}", *TINY, f"--output_dir={again}"]) == 0
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(stored["metrics"]) == ["left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"]
    assert stored["settings"]["train.epochs"] == "1"
    alone = {
        run.settings["loss.main_task"]: run
        for run in Store("digits", str(again)).runs()
        if run.seed == 1 and run.loss_method == "stl"
    }
    assert stored["metrics"]["sum/mae"]["runs"][1] == pytest.approx(alone["2"].metrics["sum/mae"], abs=1e-6)
    for row in stored["metrics"].values():
        assert len(row["runs"]) == 2
        assert row["mean"] == pytest.approx(sum(row["runs"]) / 2, abs=1e-6)
    assert "--seeds=2" in stored["command"]
