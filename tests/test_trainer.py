import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console

from balance import gradient_balancers, loss_balancers
from experiments import trainer
from experiments.analysis import baselines as reference
from experiments.recording.store import common_of, fingerprint

ROOT = Path(__file__).parents[1]
TINY = ["data.train_pairs=256", "data.validation_pairs=100", "data.test_pairs=100", "train.epochs=2"]


def train(*arguments, quiet=True):
    config = trainer.configure(trainer.build_parser().parse_intermixed_args(list(arguments)))
    return trainer.train(trainer.prepare(config, Console(quiet=quiet)))


def runs_in(folder):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("balance/digits").experiment_id]), client


FAST = (None, "pcgrad")
GRADIENTS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (None, *gradient_balancers.names())]


@pytest.mark.filterwarnings("ignore:mgda gives all weight", "ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("loss", loss_balancers.names())
def test_every_pairing_trains_digits_for_one_epoch(loss, gradient, tmp_path):
    chosen = [f"--loss_method={loss}", *([f"--gradient_method={gradient}"] if gradient else [])]
    arguments = [*chosen, "train.epochs=1", "data.train_pairs=3000", "track=false", f"output_dir={tmp_path}"]
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
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["checkpoints", "config.yaml"]
    kept = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "checkpoints")]
    assert kept == ["checkpoints/best.pt", "checkpoints/last.pt"]
    assert run.data.tags["kind"] == "run"
    assert run.data.metrics["cost/step_ms"] > 0
    assert run.data.metrics["cost/run_s"] > 0
    # the gradients of four tasks on 23 296 parameters, and less than a hundred times as much in all
    assert 4 * 23_296 * 4 / 2**20 < run.data.metrics["cost/step_mib"] < 40
    data = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
    assert {context: json.loads(used.profile)["num_rows"] for context, used in data.items()} == {
        "training": 256,
        "validation": 100,
        "testing": 100,
    }
    assert len({used.digest for used in data.values()}) == 3


def test_the_last_checkpoint_holds_what_goes_on(demo):
    folder, _ = demo
    (file,) = (folder / "runs" / "digits").glob("*/last.pt")
    last = torch.load(file)
    assert last["epoch"] == 2
    assert set(last) == {"model", "balancer", "optimizer", "epoch"}
    assert all(state["step"] == 8 for state in last["optimizer"]["state"].values())


def test_the_model_in_mlflow_is_given_back(demo, monkeypatch):
    """`mlflow.pytorch.load_model` from a run, with the weights of the best epoch and without the project on the path."""
    import mlflow

    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    (logged,) = client.search_logged_models([run.info.experiment_id])
    assert logged.source_run_id == run.info.run_id
    (file,) = (folder / "runs" / "digits").glob("*/best.pt")
    best = torch.load(file)["model"]
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        mlflow.set_tracking_uri(None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # MLflow's, of its own type hints
            import mlflow.pytorch

            network = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
            served = mlflow.pyfunc.load_model(logged.model_uri)
    assert all(torch.equal(tensor, best[name]) for name, tensor in network.state_dict().items())
    inputs = torch.rand(3, 1, 12, 12)
    answers = served.predict(inputs.numpy())
    assert {task: answer.shape for task, answer in answers.items()} == {
        "left": (3, 10),
        "right": (3, 10),
        "sum": (3, 1),
        "reconstruction": (3, 64),
    }
    assert torch.equal(torch.from_numpy(answers["sum"]), network(inputs)["sum"].detach())


@pytest.mark.slow
def test_mlflow_models_predict(demo, tmp_path):
    folder, _ = demo
    (run,), client = runs_in(folder / "runs")
    (tmp_path / "inputs.json").write_text(json.dumps({"inputs": torch.rand(2, 1, 12, 12).tolist()}), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "-m",
        f"runs:/{run.info.run_id}/model",
        "--env-manager",
        "local",
    ]
    command += ["-t", "json", "-i", str(tmp_path / "inputs.json")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)["predictions"]
    assert [len(row) for row in answers["reconstruction"]] == [64, 64]


def test_fingerprints_tell_runs_apart_by_what_decides_their_result():
    def of(*arguments):
        return fingerprint(trainer.configure(trainer.build_parser().parse_intermixed_args(list(arguments))))

    assert of() == of("output_dir=elsewhere", "log_every=3", "log_model=false") == of("--loss_method=ls", "train.lr=3e-3")
    others = ["--seed=1", "--loss_method=uw", "--gradient_method=mgda", "train.lr=0.01", "data.seed=1", "balancer.scale=norm"]
    assert len({of(), *map(of, others)}) == 1 + len(others)


def test_system_metrics_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")
    train("--loss_method=ls", *TINY[:3], "train.epochs=10", "system_metrics=true", "log_model=false", f"output_dir={tmp_path}")
    (run,), client = runs_in(tmp_path)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert client.search_logged_models([run.info.experiment_id]) == []


def test_same_seed_same_result(tmp_path):
    def result(seed):
        return train(
            "--loss_method=rlw", "--gradient_method=pcgrad", *TINY, f"--seed={seed}", "track=false", f"output_dir={tmp_path}"
        )

    assert result(0) == result(0) != result(1)


def test_features_as_source(tmp_path):
    arguments = ("--loss_method=uw", "--gradient_method=mgda", "balancer.source=features", "balancer.scale=norm")
    assert train(*arguments, *TINY, "track=false", f"output_dir={tmp_path}")


GRAMIAN_RULES = [name for name in gradient_balancers.names() if gradient_balancers.sees(name) == "gramian"]
MEASURES = [["balancer.source=parameters"], ["balancer.source=features"], ["balancer.measure=[7.*]"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize("gradient", GRAMIAN_RULES)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda words: words[0])
def test_every_gramian_rule_trains_with_every_source(gradient, measure, tmp_path):
    """After a few epochs the test metrics are far from those of chance."""
    methods = ["--loss_method=scaleinvls", f"--gradient_method={gradient}"]  # by equal weights, the sum would hide the others
    words = [*methods, *measure, "train.epochs=6", "balancer.scale=norm", "track=false"]
    final = train(*words, f"output_dir={tmp_path}")
    assert final["left/accuracy"] > 0.18
    assert final["right/accuracy"] > 0.18
    assert final["sum/mae"] < 3.5
    assert final["reconstruction/rmse"] < 0.26


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gradient_method=mgda", "balancer.measure=[trunk.9]"], "Unknown name in balancer.measure 'trunk.9'"),
        (["balancer.measure=['*']"], "balancer.measure needs a gradient method that gives weights, but got None"),
        (["--gradient_method=graddrop", "balancer.measure=['*']"], "gives weights, but got graddrop"),
        (["--gradient_method=mgda", "balancer.measure=['*']", "balancer.source=features"], "needs balancer.source=parameters"),
        (["--gradient_method=graddrop", "balancer.memory=gramian"], "memory='gramian' does not keep"),
    ],
)
def test_choices_of_the_engine_that_do_not_fit(words, message, tmp_path):
    config = trainer.configure(trainer.build_parser().parse_intermixed_args([*words, *TINY, f"output_dir={tmp_path}/runs"]))
    with pytest.raises(ValueError, match=message):
        trainer.prepare(config, Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_the_engine_is_not_a_setting_of_the_result(tmp_path):
    """Runs that differ only in how gradients are had are one row of a table."""
    words = ["--gradient_method=mgda", *TINY]
    configs = [
        trainer.configure(trainer.build_parser().parse_intermixed_args([*words, *more]))
        for more in ([], ["balancer.engine=loop", "balancer.memory=jacobian"], ["balancer.measure=['*']"])
    ]
    prints = [fingerprint(config) for config in configs]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss_method=scaleinvls+rlw", "loss.rlw.scale=4"],
        ["--gradient_method=nashmtl", "balancer.every=3", "balancer.smoothing=0.5"],
        ["--gradient_method=pcgrad", "balancer.groups=[[left,right],[sum,reconstruction]]"],
        ["--gradient_method=mgda", "gradient.normalization=loss+"],
        ["--loss_method=famo", "loss.next_batch=true", "train.max_norm=1.0"],
    ],
)
def test_compositions_on_the_command_line(arguments, tmp_path):
    assert train(*arguments, *TINY, "track=false", f"output_dir={tmp_path}")


def test_compositions_reach_the_stage(tmp_path):
    words = ["--loss_method=scaleinvls+uw", "--gradient_method=pcgrad", "balancer.every=3", "loss.uw.init=0.5", "track=false"]
    words += ["balancer.groups=[[left,right],[sum,reconstruction]]", "gradient.order=fixed", f"output_dir={tmp_path}", *TINY]
    balancer = trainer.prepare(
        trainer.configure(trainer.build_parser().parse_intermixed_args(words)), Console(quiet=True)
    ).balancer
    assert balancer.loss_balancer.rule.rules[1].log_variances[0].item() == 0.5
    assert balancer.gradient_balancer.rule.n == 3
    assert balancer.gradient_balancer.rule.rule.rule.membership.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert balancer.gradient_balancer.rule.rule.rule.rule.rule.order == "fixed"
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
        selection.offer(epoch, metrics, trainer.checkpoint(run, epoch))
    assert selection.epoch == 2
    assert (selection.state["model"]["trunk.0.bias"] == 2).all()


def test_single_task_learning_is_judged_by_its_task(tmp_path):
    arguments = ["--loss_method=stl", "loss.main_task=2", "track=false", *TINY, f"output_dir={tmp_path}"]
    run = trainer.prepare(trainer.configure(trainer.build_parser().parse_intermixed_args(arguments)), Console(quiet=True))
    selection = trainer.Selection(run)
    metrics = {"left/accuracy": 0.1, "right/accuracy": 0.1, "reconstruction/rmse": 9.0}
    assert selection.drop(metrics | {"sum/mae": selection.baselines["sum/mae"]}) == pytest.approx(0)


def test_baselines_cover_every_metric():
    known, settings = reference.shipped("digits")
    assert set(known.metrics) == {"left/accuracy", "right/accuracy", "sum/mae", "reconstruction/rmse"}
    text = (ROOT / "experiments/problems/digits/baselines.yaml").read_text(encoding="utf-8")
    stored = yaml.safe_load(text)
    assert stored["command"].startswith("python experiments/baselines.py")
    assert all(len(row["runs"]) == 3 for row in stored["metrics"].values())
    config = trainer.configure(trainer.build_parser().parse_intermixed_args([]))
    assert settings == dict(common_of(config))  # they were measured with what is the default now


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
        (["--loss_method=scaleinvls+famo"], "must come first"),
        (["--loss_method=scaleinvls+rwl"], "Did you mean 'rlw'?"),
        (["--loss_method=scaleinvls,rlw"], "in a chain, write scaleinvls+rlw"),
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
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
