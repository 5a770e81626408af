import pytest
import yaml

from experiments import trainer
from experiments.config.layers import values_by_key
from tests.experiments.short_runs import BOTH, ON_DISK, configure


def test_the_configuration_is_printed_and_nothing_else_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--experiment=nyuv2", "--print_config", *BOTH, "model.name=segnet", "data.num_train=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["num_train"] == 7
    assert printed["model"] == {"name": "segnet"}
    assert printed["loss"]["gamma"] == 0.001
    assert printed["train"]["report_last"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "gamma", "groups"),
    [("nyuv2", 0.001, 2), ("cityscapes", 0.01, 2), ("celeba", 0.001, 2), ("quantum_chemistry", 0.001, 5), ("toy", 0.0, 2)],
)
def test_methods_have_the_options_of_the_papers(name, gamma, groups):
    assert configure(f"--experiment={name}", *BOTH).loss.gamma == gamma
    assert configure(f"--experiment={name}", *BOTH).gradient.c == 0.4
    assert configure(f"--experiment={name}", "--loss_method=go4align").loss.num_groups == groups
    chain = configure(f"--experiment={name}", "--loss_method=famo+uw", "loss.famo.lr=0.5")
    assert (chain.loss.famo.gamma, chain.loss.famo.lr) == (gamma, 0.5)


def test_none_is_a_gradient_method(tmp_path):
    config = configure("--gradient_method=none")
    assert config.gradient_method is None


PAPERS = {
    "nyuv2": {
        "epochs": 200,
        "batch_size": 2,
        "lr": 1e-4,
        "schedule": "step",
        "step_epochs": 100,
        "factor": 0.5,
        "report_last": 10,
    },
    "cityscapes": {"epochs": 200, "batch_size": 8, "lr": 1e-4, "schedule": "step", "factor": 0.5, "report_last": 10},
    "celeba": {"epochs": 15, "batch_size": 256, "lr": 3e-4, "schedule": "constant", "report_last": None},
    "quantum_chemistry": {
        "epochs": 300,
        "batch_size": 120,
        "schedule": "plateau",
        "factor": 0.7,
        "patience": 5,
        "min_lr": 1e-5,
    },
    "multimnist": {"epochs": 100, "batch_size": 128, "schedule": "step", "step_epochs": 50, "factor": 0.1, "warmup_steps": 469},
    "toy": {"epochs": 50, "lr": 1e-3, "report_last": 1},
    "metaworld": {"epochs": 66, "batch_size": 1280, "lr": 3e-4, "schedule": "constant", "report_last": None},
}
PAPER_MODELS = {"nyuv2": ("name", "mtan"), "cityscapes": ("name", "mtan"), "celeba": ("name", "official")}
OWN_MODELS = {"metaworld": ("width", 400)}  # on its own tasks, a smaller network
PAPER_MODELS |= {"quantum_chemistry": ("dim", 64), "multimnist": ("name", "demo")}


@pytest.mark.parametrize("name", PAPERS)
def test_protocol_paper_selects_the_official_settings(name):
    where = ["data.path=somewhere"] if name in ON_DISK else []
    config = configure(f"--experiment={name}", "protocol=paper", *where)
    assert {key: config.train[key] for key in PAPERS[name]} == PAPERS[name]
    assert config.data.get("protocol", "paper") == "paper"
    if name in PAPER_MODELS | OWN_MODELS:
        key, value = (PAPER_MODELS | OWN_MODELS)[name]
        assert config.model[key] == value
    assert configure(f"--experiment={name}", "protocol=paper", *where, "train.epochs=10").train.epochs == 10


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_data_set_gets_the_published_network(name):
    sound, paper = (configure(f"--experiment={name}", "data.path=somewhere", f"protocol={p}") for p in ("sound", "paper"))
    assert sound.model == paper.model
    assert sound.train.batch_size == paper.train.batch_size
    if name != "multimnist":
        same = ("epochs", "lr", "schedule", "step_epochs", "factor", "patience", "min_lr")
        assert [sound.train[key] for key in same] == [paper.train[key] for key in same]
        assert (sound.train.max_norm, paper.train.max_norm) == (1.0, None)
        assert sound.train.report_last is None


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "celeba", "quantum_chemistry"])
def test_the_official_code_clips_after_some_methods(name):
    for method, length in {"pcgrad": 1.0, "cagrad": 1.0, "graddrop": 1.0, "nashmtl": None, "none": None}.items():
        config = configure(f"--experiment={name}", "protocol=paper", "data.path=x", f"--gradient_method={method}")
        assert config.train.max_norm == length
    sound = configure(f"--experiment={name}", "data.path=x", "--gradient_method=pcgrad")
    assert sound.train.max_norm == 1.0


def test_the_last_value_of_a_key_counts():
    assert values_by_key(["a.b=1", "c=x=y", "a.b=2"]) == {"a.b": "2", "c": "x=y"}
