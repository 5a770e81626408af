import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console

from balance import gradient_balancers, loss_balancers
from experiments import baselines, compare, sweep, trainer

ROOT = Path(__file__).parents[1]
TINY = ["data.train_pairs=256", "data.validation_pairs=100", "data.test_pairs=100", "train.epochs=2"]


def train(*arguments, quiet=True):
    config = trainer.configure(trainer.build_parser().parse_intermixed_args(list(arguments)))
    return trainer.train(trainer.prepare(config, Console(quiet=quiet)))


def runs_in(folder):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("balance/digits").experiment_id]), client


FAST = (None, "mgda", "pcgrad")
GRADIENTS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (None, *gradient_balancers.names())]


@pytest.mark.filterwarnings("ignore:mgda gives all weight", "ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("loss", loss_balancers.names())
def test_every_pairing_trains_digits_for_one_epoch(loss, gradient, tmp_path):
    chosen = [f"--loss_method={loss}", *([f"--gradient_method={gradient}"] if gradient else [])]
    arguments = [*chosen, "train.epochs=1", "track=false", f"output_dir={tmp_path}"]
    run = trainer.prepare(trainer.configure(trainer.build_parser().parse_intermixed_args(arguments)), Console(quiet=True))
    assert run.balancer.heads == (gradient_balancers.heads(gradient) if gradient else "unweighted")
    final = trainer.train(run)
    assert all(torch.tensor(value).isfinite() for value in final.values())
    if loss != "stl":  # an untrained network, which answers 0, has 9 and 0.44
        assert final["sum/mae"] < 7 or final["reconstruction/rmse"] < 0.35


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One small run of the main job, as a user starts it, from a directory that has nothing to do with the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "--loss_method=go4align", "--gradient_method=pcgrad"]
    before = source_files()
    done = subprocess.run([*command, *TINY, "seed=4"], cwd=folder, capture_output=True, text=True, check=True)
    assert source_files() == before
    return folder, done.stdout


def source_files():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {name: (ROOT / name).stat().st_mtime_ns for name in listed.stdout.split() if (ROOT / name).exists()}


def test_output_goes_below_the_current_directory(demo):
    folder, printed = demo
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run_folder,) = (folder / "runs" / "digits").iterdir()
    assert "go4align-pcgrad-seed4" in run_folder.name
    final = json.loads((run_folder / "final.json").read_text(encoding="utf-8"))
    assert f"delta_m {final['delta_m']:+.2f} %" in printed
    for task in ("left", "right", "sum", "reconstruction"):
        assert task in printed
    checkpoint = torch.load(run_folder / "best.pt")
    assert checkpoint["epoch"] in (1, 2)
    assert "trunk.0.weight" in checkpoint["model"]
    assert yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))["train"]["epochs"] == 2


def test_the_run_in_mlflow(demo):
    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    assert run.info.status == "FINISHED"
    assert {"loss_method": "go4align", "gradient_method": "pcgrad", "seed": "4"}.items() <= run.data.tags.items()
    assert {"train.epochs": "2", "loss.num_groups": "3", "balancer.source": "parameters"}.items() <= run.data.params.items()
    tasks = ("left", "right", "sum", "reconstruction")
    names = {f"{group}/{task}" for group in ("loss", "weight", "gradient_weight") for task in tasks}
    names |= {f"cosine/{a}__{b}" for i, a in enumerate(tasks) for b in tasks[i + 1 :]}
    measured = {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    names |= {f"{group}/{name}" for group in ("val", "final") for name in measured} | {"final/delta_m"}
    assert names <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "val/sum/mae")) == 2
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_same_seed_same_result(tmp_path):
    def result(seed):
        return train(
            "--loss_method=rlw", "--gradient_method=pcgrad", *TINY, f"--seed={seed}", "track=false", f"output_dir={tmp_path}"
        )

    assert result(0) == result(0) != result(1)


def test_features_as_source(tmp_path):
    arguments = ("--loss_method=uw", "--gradient_method=mgda", "balancer.source=features", "balancer.scale=norm")
    assert train(*arguments, *TINY, "track=false", f"output_dir={tmp_path}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss_method=scaleinvls,rlw", "loss.rlw.scale=4"],
        ["--gradient_method=nashmtl", "balancer.every=3", "balancer.smoothing=0.5"],
        ["--gradient_method=pcgrad", "balancer.groups=[[left,right],[sum,reconstruction]]"],
        ["--gradient_method=mgda", "gradient.normalization=loss+"],
        ["--loss_method=famo", "loss.next_batch=true", "train.max_norm=1.0"],
    ],
)
def test_compositions_on_the_command_line(arguments, tmp_path):
    assert train(*arguments, *TINY, "track=false", f"output_dir={tmp_path}")


def test_compositions_reach_the_stage(tmp_path):
    words = ["--loss_method=scaleinvls,uw", "--gradient_method=pcgrad", "balancer.every=3", "loss.uw.init=0.5", "track=false"]
    words += ["balancer.groups=[[left,right],[sum,reconstruction]]", "gradient.order=fixed", f"output_dir={tmp_path}", *TINY]
    balancer = trainer.prepare(
        trainer.configure(trainer.build_parser().parse_intermixed_args(words)), Console(quiet=True)
    ).balancer
    assert balancer.loss.rules[1].log_variances[0].item() == 0.5
    assert balancer.gradient.n == 3
    assert balancer.gradient.rule.membership.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert balancer.gradient.rule.rule.order == "fixed"
    assert balancer.heads == "unweighted"


def test_parameters_of_the_balancer_have_their_own_learning_rate(tmp_path, monkeypatch):
    groups = []
    adam = torch.optim.Adam

    def spy(parameters):
        groups.extend(dict(group) for group in parameters)
        return adam(parameters)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    train("--loss_method=uw", *TINY, "track=false", f"output_dir={tmp_path}", "train.lr=0.01")
    assert [group["lr"] for group in groups] == [0.01, 0.025]
    assert len(groups[1]["params"]) == 4
    assert all(log_variance != 0 for log_variance in groups[1]["params"])


def test_the_best_epoch_on_validation_is_kept(tmp_path):
    config = trainer.configure(trainer.build_parser().parse_intermixed_args(["track=false", *TINY, f"output_dir={tmp_path}"]))
    run = trainer.prepare(config, Console(quiet=True))
    selection = trainer.Selection(run)
    good = {"left/accuracy": 0.9, "right/accuracy": 0.9, "sum/mae": 1.0, "reconstruction/rmse": 0.1}
    bias = run.model.trunk[0].bias
    for epoch, metrics in enumerate([good | {"sum/mae": 2.0}, good, good | {"left/accuracy": 0.5}], start=1):
        torch.nn.init.constant_(bias, epoch)
        selection.offer(epoch, metrics)
    assert selection.epoch == 2
    assert (selection.state["model"]["trunk.0.bias"] == 2).all()


def test_single_task_learning_is_judged_by_its_task(tmp_path):
    arguments = ["--loss_method=stl", "loss.main_task=2", "track=false", *TINY, f"output_dir={tmp_path}"]
    run = trainer.prepare(trainer.configure(trainer.build_parser().parse_intermixed_args(arguments)), Console(quiet=True))
    selection = trainer.Selection(run)
    metrics = {"left/accuracy": 0.1, "right/accuracy": 0.1, "reconstruction/rmse": 9.0}
    assert selection.drop(metrics | {"sum/mae": selection.baselines["sum/mae"]}) == pytest.approx(0)


def test_baselines_cover_every_metric():
    known = trainer.read_baselines("digits")
    assert set(known) == {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    text = (ROOT / "experiments/digits/baselines.yaml").read_text(encoding="utf-8")
    stored = yaml.safe_load(text)
    assert stored["command"].startswith("python experiments/baselines.py")
    assert all(len(row["runs"]) == 3 for row in stored["metrics"].values())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss_method=go4aling"], "Unknown loss balancer 'go4aling'. Did you mean 'go4align'?"),
        (["--gradient_method=mdga"], "Unknown gradient balancer 'mdga'. Did you mean 'mgda'?"),
        (["--experiment=digit"], "Unknown experiment 'digit'. Did you mean 'digits'?"),
        (["train.epoch=3"], "Unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        (["train.epochs=three"], "does not fit 'train.epochs'"),
        (["--seed=one"], "does not fit 'seed'"),
        (["train.epochs=0"], "train.epochs must be at least 1"),
        (["train.lr=-1.0"], "train.lr must be positive"),
        (["--loss_method=go4align", "loss.num_groups=many"], "does not fit 'loss.num_groups'"),
        (["--loss_method=go4align", "loss.num_groups=0"], "must be at least 1"),
        (["--loss_method=uw", "loss.num_groups=2"], "Unknown key 'loss.num_groups'"),
        (["--loss_method=stl", "loss.main_task=9"], "main_task of 'stl' must be in 0..3"),
        (["device=gpu"], "device=gpu is not to be had"),
        (["balancer.every=2"], "need a gradient method"),
        (["--gradient_method=mgda", "balancer.groups=[[left],[rihgt]]"], "Did you mean 'right'?"),
        (["--gradient_method=mgda", "balancer.groups=[[left]]"], "exactly one group"),
        (["--loss_method=scaleinvls,famo"], "must come first"),
        (["--loss_method=scaleinvls,rwl"], "Did you mean 'rlw'?"),
        (["--gradient_method=graddrop", "balancer.every=2"], "sees the Jacobian"),
        (["train.schedule=linear"], "does not fit 'train.schedule'"),
        (["output_dir=/dev/null/runs"], "cannot write to /dev/null/runs"),
        (["data.train_pairs=0"], "at least one pair"),
        (["--los_method=uw"], "unrecognized arguments: --los_method=uw"),
        (["epochs"], "must read key=value"),
    ],
)
def test_mistakes_answer_with_exit_code_2_and_no_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        trainer.main([*arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_mistake_on_the_real_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "--loss_method=famoo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean 'famo'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tracking_server_that_cannot_be_used_costs_no_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://server")
    with pytest.raises(SystemExit) as caught:
        trainer.main([*TINY, f"output_dir={tmp_path}"])
    assert caught.value.code == 2
    assert "MLflow at nonsense://server cannot be used" in capsys.readouterr().err


def test_help_lists_every_name(capsys):
    with pytest.raises(SystemExit) as caught:
        trainer.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in (*loss_balancers.names(), *gradient_balancers.names(), "digits"):
        assert name in text


def test_none_is_a_gradient_method(tmp_path):
    config = trainer.configure(trainer.build_parser().parse_intermixed_args(["--gradient_method=none"]))
    assert config.gradient_method is None


def test_ctrl_c_closes_the_run_and_keeps_what_was_logged(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "train.epochs=1000", "data.train_pairs=256", "log_every=1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "KILLED" in rest
    assert "Traceback" not in rest
    (run,), client = runs_in(tmp_path / "runs")
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "val/sum/mae")) >= 2
    assert len(client.get_metric_history(run.info.run_id, "loss/sum")) >= 8


# --- sweep, baselines, compare ----------------------------------------------------------------------------------------


def test_sweep_and_compare(tmp_path, capfd):
    arguments = ["--methods", "ls", "go4align+pcgrad", "--seeds", "0", "1", "--jobs", "2", *TINY, f"output_dir={tmp_path}"]
    assert sweep.main(arguments) == 0
    assert "4 runs finished, 0 failed" in capfd.readouterr().out
    assert sweep.main(["--methods", "ls", "--jobs", "1", *TINY, f"output_dir={tmp_path}", "train.lr=0.01"]) == 0
    capfd.readouterr()
    assert compare.main([f"--output_dir={tmp_path}"]) == 0
    lines = capfd.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| method | seeds | ")
    assert "delta_m" in lines[0]
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines[2:])}
    assert rows == {"ls train.lr=0.003": "2", "ls train.lr=0.01": "1", "go4align + pcgrad": "2"}
    with_spread = next(line for line in lines if "go4align" in line)
    assert with_spread.count("±") == 5


def test_a_run_that_fails_does_not_end_the_sweep(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(trainer, "train", lambda run: 1 / 0 if run.config.seed == 0 else {"delta_m": 1.0})
    assert sweep.main(["--methods", "ls", "--seeds", "0", "1", "--jobs", "1", "track=false", f"output_dir={tmp_path}"]) == 1
    out = capfd.readouterr().out
    assert "ZeroDivisionError" in out
    assert "1 runs finished, 1 failed" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ls", "mgda"], "Unknown loss balancer 'mgda'"),
        (["--methods", "ls+pcgard"], "Did you mean 'pcgrad'?"),
        (["--methods", "ls", "train.epoch=1"], "Unknown key 'train.epoch'"),
        (["--methods", "go4align", "loss.num_groups=0"], "at least 1"),
        (["--methods", "ls", "--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_mistakes_in_a_sweep(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_baselines(tmp_path, capfd):
    file = tmp_path / "baselines.yaml"
    overrides = ["--overrides", *TINY, "train.epochs=1", "track=false", f"output_dir={tmp_path}"]
    assert baselines.main(["--seeds", "0", "1", "--jobs", "1", "--output", str(file), *overrides]) == 0
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert set(stored["metrics"]) == {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    for row in stored["metrics"].values():
        assert len(row["runs"]) == 2
        assert row["mean"] == pytest.approx(sum(row["runs"]) / 2, abs=1e-6)
    assert "--seeds 0 1" in stored["command"]


@pytest.mark.parametrize("arguments", [["--experiment=none"], []])
def test_compare_without_runs(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compare.main([*arguments, f"--output_dir={tmp_path}"])
    assert caught.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
