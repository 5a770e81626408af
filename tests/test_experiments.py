"""Every experiment through the one trainer: on the data that ships with it, and on folders in the official layouts."""

import io
import json
import math
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from rich.console import Console
from torch import nn
from torch.utils.data import SequentialSampler

from balance import Report
from experiments import baselines, compare, sweep, trainer
from experiments.analysis import baselines as reference
from experiments.analysis import published_tables as published
from experiments.datasets.rooms import write
from experiments.problems import base as experiment
from experiments.problems.dense.augmentation import Augmented
from experiments.recording.store import common_of, fingerprint
from experiments.sweeps import runtime as estimate
from experiments.training import checkpoint as selection
from experiments.training import console as display
from experiments.training.data import Batches, Waiting
from experiments.training.schedule import Schedule
from tests.qm9_files import write_qm9
from tests.test_celeba import write_celeba
from tests.test_multimnist import write_mnist

BOTH = ["--loss_method=famo", "--gradient_method=cagrad"]
DENSE = ["data.num_train=4", "data.num_validation=2", "data.num_test=2", "data.height=32", "data.width=48", "data.augment=true"]
TINY = {  # two steps, or a little more, in an epoch
    "digits": ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50"],
    "toy": ["data.steps=2"],
    "multimnist": ["train.batch_size=5385", "model.width=2"],
    "regression100": ["train.batch_size=500"],
    "nyuv2": [*DENSE, "train.batch_size=2"],
    "cityscapes": [*DENSE, "train.batch_size=2"],
    "quantum_chemistry": ["data.validation_molecules=20", "data.test_molecules=1290", "train.batch_size=8", "model.dim=4"],
    "celeba": ["data.train_images=16", "data.validation_images=8", "data.test_images=8", "train.batch_size=8"],
}
NAMES = tuple(TINY)
KINDS = {  # names of the metrics, without the task
    "nyuv2": {"miou", "pixel_accuracy", "abs_error", "rel_error", "mean_angle", "median_angle"}
    | {"within_11.25", "within_22.5", "within_30"},
    "cityscapes": {"miou", "pixel_accuracy", "abs_error", "rel_error"},
    "quantum_chemistry": {"mae"},
    "celeba": {"f1"},
    "multimnist": {"accuracy"},
}


def configure(*words):
    return trainer.configure(trainer.build_parser().parse_intermixed_args(list(words)))


def prepare(*words):
    return trainer.prepare(configure(*words), Console(quiet=True))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache, tmp_path):
    """Words for a short run of an experiment on the data that ships with it; nothing recorded unless said otherwise."""

    def words(name, *more):
        cached = [f"data.cache={cache}"] if name in ("nyuv2", "cityscapes", "celeba") else []
        return [
            f"--experiment={name}",
            f"output_dir={tmp_path}/runs",
            "train.epochs=1",
            "track=false",
            *cached,
            *TINY[name],
            *more,
        ]

    return words


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders as the data sets are distributed, by experiment; not to be changed."""
    root = tmp_path_factory.mktemp("official")
    write(root / "nyuv2", {"train": 5, "val": 2}, height=32, width=48)
    write(root / "cityscapes", {"train": 5, "val": 2}, layout="cityscapes", height=32, width=48)
    write_celeba(root / "celeba")
    write_mnist(root / "multimnist")
    write_qm9(root / "quantum_chemistry", count=8)
    return {path.name: path for path in root.iterdir()}


ON_DISK = {
    "nyuv2": ["train.batch_size=2", "model.name=small"],
    "cityscapes": ["train.batch_size=2", "model.name=small"],
    "celeba": ["train.batch_size=8", "model.name=small"],
    "multimnist": ["train.batch_size=25"],
    "quantum_chemistry": ["data.validation_molecules=1", "data.test_molecules=1", "train.batch_size=2", "model.dim=4"],
}


@pytest.fixture
def on_disk(folders, cache, tmp_path):
    """Words for a short run of an experiment on its own data set."""

    def words(name, *more, folder=None):
        if name == "quantum_chemistry":
            pytest.importorskip("rdkit")
        path = shutil.copytree(folders[name], tmp_path / name) if folder is None else folder
        cached = [f"data.cache={cache}"] if name == "celeba" else []
        start = [f"--experiment={name}", f"output_dir={tmp_path}/runs", "train.epochs=1", "track=false", f"data.path={path}"]
        return [*start, *cached, *ON_DISK[name], *more]

    return words


def finite_metrics(final):
    assert all(math.isfinite(value) for value in final.values())
    return {name for name in final if "/" in name}


def test_every_experiment_is_tested():
    assert set(NAMES) == set(experiment.names())


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_what_ships_with_the_project(name, tiny, tmp_path):
    run = prepare(*tiny(name, *BOTH))
    before = {key: value.clone() for key, value in run.model.named_parameters()}
    final = trainer.train(run)
    assert finite_metrics(final) == set(run.experiment.metrics())
    assert ("delta_m" in final) == (name in ("digits", "nyuv2"))  # which have single-task numbers of this network
    assert any(not torch.equal(value, before[key]) for key, value in run.model.trunk.named_parameters(prefix="trunk"))
    (folder,) = (tmp_path / "runs" / name).iterdir()
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "final.json", "best.pt", "last.pt"}
    assert json.loads((folder / "final.json").read_text(encoding="utf-8")) == final


@pytest.mark.parametrize("name", ON_DISK)
def test_it_trains_on_a_folder_in_the_official_layout(name, on_disk):
    config = configure(*on_disk(name, *BOTH))
    assert config.data.source == experiment.find(name).ON_DISK
    final = trainer.train(trainer.prepare(config, Console(quiet=True)))
    assert {metric.partition("/")[2] for metric in finite_metrics(final)} == KINDS[name]


# --- one step of the published networks -------------------------------------------------------------------------------


def of_pixels(values, counted):
    return values[counted].mean()


def dense_losses(outputs, batch):
    _, label, depth, *normals = batch
    b, y, x = np.nonzero(label >= 0)
    found = {
        "segmentation": -outputs["segmentation"][b, label[b, y, x], y, x].mean(),
        "depth": of_pixels(np.abs(outputs["depth"] - depth), depth != 0),
    }
    for normal in normals:
        found["normals"] = 1 - of_pixels((outputs["normals"] * normal).sum(1), (normal != 0).any(1))
    return found


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


OFFICIAL = {  # words, parameters, losses of outputs and batch as arrays of float64
    "nyuv2": (["model.name=mtan"], 44_229_073, dense_losses),
    "cityscapes": (["model.name=segnet"], 25_017_672, dense_losses),
    "celeba": (
        ["model.name=official"],
        5_197_160,
        lambda outputs, batch: {
            task: np.mean(np.log1p(np.exp(answer)) - answer * batch[1][:, k])
            for k, (task, answer) in enumerate(outputs.items())
        },
    ),
    "quantum_chemistry": (
        ["model.dim=64"],
        617_675,
        lambda outputs, batch: {
            task: np.mean((answer - batch[1][:, k]) ** 2) for k, (task, answer) in enumerate(outputs.items())
        },
    ),
    "multimnist": (  # smoothed labels; log-probabilities once more made into log-probabilities are the same
        ["model.name=demo", "train.batch_size=8", "data.imbalance=1000"],
        121_120 + 2 * 34_314,
        lambda outputs, batch: {
            "left": -np.mean((batch[1] * log_softmax(outputs["left"])).sum(1)),
            "right": -1000 * np.mean((batch[2] * log_softmax(outputs["right"])).sum(1)),
        },
    ),
}


def arrays(value):
    return value.double().numpy() if value.is_floating_point() else value.numpy()


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_step_of_the_official_network(name, tiny, on_disk):
    words, parameters, expected = OFFICIAL[name]
    run = prepare(*(on_disk if name == "multimnist" else tiny)(name, *words, "train.max_norm=1"))
    assert sum(value.numel() for value in run.model.parameters()) == parameters
    batch = next(iter(run.batches))
    with torch.no_grad():
        outputs = {task: arrays(answer) for task, answer in run.model(batch[0]).items()}
    before = [value.detach().clone() for value in run.model.parameters()]
    optimizer = trainer.build_optimizer(run)
    report = trainer.train_step(run, optimizer, batch)
    graphs = name == "quantum_chemistry"
    losses = expected(outputs, [None if graphs and part is batch[0] else arrays(part) for part in batch])
    assert dict(zip(run.experiment.TASKS, report.losses.tolist(), strict=True)) == pytest.approx(losses, rel=1e-4)
    gradients = [value.grad for value in run.model.parameters()]
    assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])) <= 1 + 1e-5
    lr = run.config.train.lr
    for old, new, gradient in zip(before, run.model.parameters(), gradients, strict=True):  # the first step of Adam
        torch.testing.assert_close(new.detach(), old - lr * gradient / (gradient.abs() + 1e-8), rtol=1e-4, atol=1e-3 * lr)


# --- configuration ----------------------------------------------------------------------------------------------------


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
}
PAPER_MODELS = {"nyuv2": ("name", "mtan"), "cityscapes": ("name", "mtan"), "celeba": ("name", "official")}
PAPER_MODELS |= {"quantum_chemistry": ("dim", 64), "multimnist": ("name", "demo")}


@pytest.mark.parametrize("name", PAPERS)
def test_protocol_paper_selects_the_official_settings(name):
    where = ["data.path=somewhere"] if name in ON_DISK else []
    config = configure(f"--experiment={name}", "protocol=paper", *where)
    assert {key: config.train[key] for key in PAPERS[name]} == PAPERS[name]
    assert config.data.get("protocol", "paper") == "paper"
    if name in PAPER_MODELS:
        key, value = PAPER_MODELS[name]
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


@pytest.mark.parametrize("protocol", ["sound", "paper"])
def test_what_is_clipped(protocol, tiny):
    words = [
        "--gradient_method=pcgrad",
        f"protocol={protocol}",
        "train.report_last=null",
        "train.max_norm=1e-3",
        "model.name=small",
    ]
    run = prepare(*tiny("nyuv2", *words))
    trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    trunk, heads = (
        torch.linalg.vector_norm(torch.cat([value.grad.flatten() for value in part.parameters()]))
        for part in (run.model.trunk, run.model.heads)
    )
    if protocol == "paper":
        assert trunk.item() == pytest.approx(1e-3, rel=1e-3)
        assert heads.item() > 1e-2
    else:
        assert torch.hypot(trunk, heads).item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "celeba", "quantum_chemistry", "quantum_chemistry_retuned"])
def test_settings_of_the_papers_are_those_of_their_tables(name):
    table = published.load(name)
    retuned = ["train.batch_size=60", "train.patience=10"] if name.endswith("retuned") else []
    words = [f"--experiment={table.experiment}", "protocol=paper", "data.path=x", *retuned]
    common = common_of(configure(*words))
    assert table.differences(dict(common)) == {}
    assert set(table.as_published) <= dict(common).keys()
    found = reference.for_run(table.experiment, common)
    assert found.metrics == {key: table.factors[key] * value for key, value in table.baselines.items()}
    for override in ("train.schedule=cosine", "train.report_last=3"):
        assert override.partition("=")[0] in table.differences(dict(common_of(configure(*words, override))))


def test_the_paper_compares_with_published_numbers_and_no_other_run_does():
    paper = configure("--experiment=nyuv2", "protocol=paper", "data.path=x")
    known = reference.for_run("nyuv2", common_of(paper))
    assert known.metrics["segmentation/miou"] == pytest.approx(0.3830)
    assert known.metrics["normals/mean_angle"] == 25.01
    for words in (["protocol=paper"], ["data.path=x"]):
        assert reference.for_run("nyuv2", common_of(configure("--experiment=nyuv2", *words))) is None
    celeba = configure("--experiment=celeba", "protocol=paper", "data.path=x")
    assert set(reference.for_run("celeba", common_of(celeba)).metrics) == set(experiment.find("celeba").metrics())


@pytest.mark.parametrize("name", ["digits", "multimnist", "nyuv2", "quantum_chemistry"])
def test_single_task_numbers_that_ship_are_of_the_default_settings(name):
    own = reference.for_run(name, common_of(configure(f"--experiment={name}")))
    assert own.origin == "single-task baselines"  # and not: measured with other settings
    assert set(own.metrics) == set(experiment.find(name).metrics())


def test_single_task_numbers_hold_for_their_protocol_alone():
    common = dict(common_of(configure()))
    assert reference.for_run("digits", tuple(common.items())) is not None
    assert reference.for_run("digits", tuple((common | {"protocol": "paper"}).items())) is None


def test_what_does_not_decide_a_result():
    def of(*words):
        return fingerprint(configure("--experiment=nyuv2", *words))

    same = ["train.eval_batch_size=3", "train.num_workers=2", "data.cache=elsewhere"]
    assert {of(word) for word in same} == {of()}
    assert of("data.path=a") == of("data.path=b") != of()
    papers = [of("protocol=paper", f"train.eval_batch_size={size}") for size in (2, 3)]
    assert papers[0] != papers[1]  # averages over batches


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "passes"), [("sound", 1), ("paper", 2)])
def test_the_second_forward_pass_of_famo_leaves_statistics_alone(protocol, passes, tiny):
    run = prepare(*tiny("nyuv2", "--loss_method=famo", f"protocol={protocol}", "model.name=small", "train.report_last=null"))
    trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    (counts,) = {int(value) for key, value in run.model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == passes


def test_training_data_are_told_the_epoch(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(Augmented, "set_epoch", lambda self, epoch: told.append(epoch))
    trainer.train(prepare(*tiny("nyuv2", "train.epochs=3")))
    assert told == [1, 2, 3]


@pytest.mark.parametrize("name", ["nyuv2", "quantum_chemistry"])
def test_workers_change_nothing(name, tiny):
    alone, helped = (prepare(*tiny(name, "train.epochs=3", f"train.num_workers={workers}")) for workers in (0, 1))
    assert trainer.train(alone) == trainer.train(helped)


def test_a_task_without_a_pixel_is_absent(on_disk, folders, tmp_path):
    damaged = shutil.copytree(folders["nyuv2"], tmp_path / "no_depth")
    for file in (damaged / "train" / "depth").iterdir():
        np.save(file, np.zeros_like(np.load(file)))
    run = prepare(*on_disk("nyuv2", *BOTH, "protocol=paper", "model.name=small", "train.report_last=1", folder=damaged))
    report = trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    assert report.tasks == ("segmentation", "normals")
    finite_metrics(trainer.train(run))


def test_classes_that_do_not_occur_are_told(tiny):
    run = prepare(*tiny("nyuv2"))
    run = run._replace(console=Console(width=200, record=True, file=io.StringIO()))
    trainer.train(run)
    (line,) = [line for line in run.console.export_text().splitlines() if "segmentation/miou is" in line]
    assert re.fullmatch(r"segmentation/miou is a mean over \d+ of 13 classes; the others do not occur\.", line.strip())


def test_a_network_that_is_shared_as_a_whole(tiny):
    """Its trunk gives a dict."""
    finite_metrics(trainer.train(prepare(*tiny("multimnist", "--gradient_method=pcgrad", "model.shared=everything"))))


@pytest.mark.slow
def test_features_of_each_task(tiny):
    """MTAN, whose trunk gives a tuple, with conflict measured on it."""
    run = prepare(*tiny("cityscapes", *BOTH, "model.name=mtan", "balancer.source=features"))
    report = trainer.train_step(run, trainer.build_optimizer(run), next(iter(run.batches)))
    assert report.gramian.shape == (2, 2)
    assert report.cosines[0, 1] == 0  # each task has a map of its own


def test_a_single_last_sample_joins_the_batch_before():
    def lists(count, size):
        batches = Batches(SequentialSampler(range(count)), size, drop_last=False)
        found = list(batches)
        assert len(batches) == len(found)
        assert [i for indices in found for i in indices] == list(range(count))
        return [len(indices) for indices in found]

    assert lists(7, 3) == [3, 4]
    assert lists(8, 3) == [3, 3, 2]
    assert lists(6, 3) == [3, 3]
    assert lists(1, 3) == [1]
    assert lists(3, 1) == [1, 1, 1]


@pytest.mark.parametrize(("protocol", "sizes"), [("sound", [4]), ("paper", [3, 1])])
def test_batches_of_the_papers_are_not_joined(protocol, sizes, tiny):
    words = [f"protocol={protocol}", "train.batch_size=3", "model.name=small", "train.report_last=null"]
    assert [len(batch[0]) for batch in prepare(*tiny("nyuv2", *words)).batches] == sizes


def test_waiting_is_measured():
    def slow():
        for _ in range(3):
            time.sleep(0.02)
            yield None

    waiting = Waiting(slow())
    for _ in waiting:
        time.sleep(0.02)
    assert waiting.seconds >= 0.06
    assert 0.2 < waiting.share() < 0.8


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(scores=(), epochs=4, **options):
    """Learning rates, of 1 and 10, at each of two steps in each epoch."""
    parameters = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 10.0), strict=True)])
    config = configure(
        *(f"train.{key}={value}" for key, value in ({"schedule": "constant", "epochs": epochs} | options).items())
    )
    schedule = Schedule(optimizer, config.train, 2)
    seen = []
    for epoch in range(epochs):
        for _ in range(2):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch(scores[epoch] if scores else 0.0)
    if "min_lr" not in options:
        assert [high for _, high in seen] == pytest.approx([10 * low for low, _ in seen])
    return [low for low, _ in seen]


def test_schedules():
    assert rates() == [1] * 8
    assert rates(schedule="cosine") == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8)])
    assert rates(schedule="step", step_epochs=3, factor=0.5) == [1] * 6 + [0.5] * 2
    assert rates(schedule="step", step_epochs=1, factor=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    warm = rates(schedule="cosine", warmup_steps=2)
    assert warm[:2] == pytest.approx([0.5, 0.5 + 0.5 * math.cos(math.pi / 8)])


def test_plateau():
    better = rates([5, 4, 3, 2], schedule="plateau", factor=0.7, patience=0)
    assert better == [1] * 8
    stuck = rates([5, 5, 5, 5], schedule="plateau", factor=0.7, patience=1)
    assert stuck == pytest.approx([1] * 6 + [0.7] * 2)
    assert rates([5, 5, 5, 5], schedule="plateau", factor=0.1, patience=0, min_lr=0.5)[-1] == 0.5
    assert rates([5, math.nan, math.nan, 5], schedule="plateau", factor=0.5, patience=1)[-1] == 0.5
    warm = rates(
        [5] * 5, epochs=5, schedule="plateau", factor=0.5, patience=0, warmup_steps=6
    )  # looks at epochs from the third on
    assert warm == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 0.5, 0.5])


def test_the_plateau_follows_the_score(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(Schedule, "after_epoch", lambda self, score: seen.append(score))
    words = tiny("quantum_chemistry", "train.schedule=plateau", "train.epochs=2")
    trainer.train(prepare(*words))
    assert seen[0] == 0
    assert seen[1] != 0


def test_weight_decay(tiny):
    run = prepare(*tiny("toy", "--loss_method=uw", "train.weight_decay=0.1"))
    assert [group["weight_decay"] for group in trainer.build_optimizer(run).param_groups] == [0.1, 0]


# --- selection --------------------------------------------------------------------------------------------------------


def test_change_by_hand():
    first = {"a/x": 2.0, "b/y": 0.5}
    assert selection.change(first, first, {"a/x"}) == 0
    assert selection.change({"a/x": 2.0, "b/y": 0.25}, first, {"a/x"}) == pytest.approx(0.5 * 100 * -0.25 / 0.375)
    assert selection.change({"a/x": 4.0, "b/y": 0.5}, first, {"a/x"}) == pytest.approx(0.5 * -100 * 2 / 3)


def test_change_is_not_led_by_zero_nor_by_what_is_no_number():
    higher = {"a/x"}
    assert selection.change({"a/x": 0.0}, {}, higher) == 200 == selection.change({"a/x": 0.0}, {"a/x": 0.3}, higher)
    assert selection.change({"b/y": 0.0}, {}, higher) == -200 == selection.change({"b/y": 0.0}, {"b/y": 7.0}, higher)
    assert selection.change({"a/x": math.nan}, {"a/x": 1.0}, higher) == 200
    assert selection.change({"b/y": math.inf}, {"b/y": 1.0}, higher) == 200


def offered(run, epochs):
    chosen = selection.Selection(run)
    scores = [chosen.offer(epoch, metrics, {"epoch": epoch}) for epoch, metrics in enumerate(epochs, start=1)]
    assert chosen.state["epoch"] == chosen.epoch == torch.load(run.folder / "best.pt")["epoch"]
    return chosen, scores


def test_the_best_epoch_without_single_task_numbers(tiny):
    run = prepare(*tiny("cityscapes"))
    begin = {"segmentation/miou": 0.0, "segmentation/pixel_accuracy": 0.4, "depth/abs_error": 0.1, "depth/rel_error": 2.0}
    better = begin | {"segmentation/miou": 0.2, "depth/abs_error": 0.05}
    chosen, scores = offered(run, [begin, better, better | {"depth/rel_error": 2.1}, begin])
    assert chosen.epoch == 2
    assert scores[0] > scores[2] > scores[1]
    assert scores[3] == scores[0]  # a metric that began at zero is judged alike at any time
    assert chosen.drop(better) is None


def test_the_best_epoch_of_celeba_has_the_largest_mean_f1(tiny):
    run = prepare(*tiny("celeba"))
    zeros = dict.fromkeys(run.experiment.metrics(), 0.0)
    chosen, scores = offered(run, [zeros, zeros | {"bald/f1": 0.8}, zeros | {"bald/f1": 0.5, "young/f1": 0.4}])
    assert chosen.epoch == 3
    assert scores == pytest.approx([0, -0.8 / 40, -0.9 / 40])
    alone = prepare(*tiny("celeba", "--loss_method=stl", "loss.main_task=4"))
    assert offered(alone, [zeros, zeros | {"bald/f1": 0.8}, zeros | {"bald/f1": 0.5, "young/f1": 0.9}])[0].epoch == 2


@pytest.mark.parametrize("name", ["nyuv2", "multimnist"])
def test_the_paper_reports_the_mean_of_the_last_epochs(name, on_disk, monkeypatch):
    """The test set is the validation set, is evaluated once in every epoch, and selects nothing."""
    found = []
    evaluate = trainer.evaluate

    def kept(run, data):
        found.append(evaluate(run, data))
        return found[-1]

    monkeypatch.setattr(trainer, "evaluate", kept)
    words = ["protocol=paper", "train.epochs=3", "train.report_last=2", *(["model.name=small"] if name == "nyuv2" else [])]
    run = prepare(*on_disk(name, *words))
    final = trainer.train(run)
    assert len(found) == 3
    for metric in run.experiment.metrics():
        assert final[metric] == pytest.approx((found[1][metric] + found[2][metric]) / 2)
    assert torch.load(run.folder / "best.pt")["epoch"] == 3
    assert ("delta_m" in final) == (name == "nyuv2")  # against the published numbers


def test_the_protocol_reaches_losses_and_metrics(tiny):
    sound, paper = (
        trainer.build(configure(*tiny("nyuv2", f"protocol={protocol}", "model.name=small", "train.report_last=null")))
        for protocol in ("sound", "paper")
    )
    assert type(sound.experiment.metrics()["depth/abs_error"]).__name__ == "PixelMean"
    assert type(paper.experiment.metrics()["depth/abs_error"]).__name__ == "BatchMean"
    image, label, depth, _ = sound.data.train[[0]]
    normal = torch.tensor([0.6, -0.6, 0.0])[:, None, None].expand(1, 3, *label.shape[1:])  # counts in the one, not in the other
    outputs = sound.model.eval()(image)
    assert "normals" in sound.experiment.losses(outputs, (image, label, depth, normal))
    assert "normals" not in paper.experiment.losses(outputs, (image, label, depth, normal))
    assert paper.data.test is paper.data.validation
    assert sound.data.test is not sound.data.validation


# --- many tasks, graphs, MLflow ---------------------------------------------------------------------------------------


def test_many_tasks_are_logged_in_short():
    def report(gradients):
        numbers = torch.ones(len(gradients))
        tasks = tuple(f"t{k}" for k in range(len(gradients)))
        return Report(tasks, numbers, numbers, numbers, numbers, gradients @ gradients.T)

    gradients = torch.randn(13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, whole = display.logged(report(gradients)), report(gradients).as_metrics()
    cosines = [value for name, value in whole.items() if name.startswith("cosine/")]
    assert len(cosines) == 78
    assert short["cosine/mean"] == pytest.approx(np.mean(cosines))
    assert short["cosine/min"] == pytest.approx(min(cosines))
    assert short["conflicts"] == whole["conflicts"] > 0
    assert set(short) == {name for name in whole if not name.startswith("cosine/")} | {"cosine/mean", "cosine/min"}
    assert display.logged(report(gradients[:12])) == report(gradients[:12]).as_metrics()
    metrics = {f"t{k}/f1": k / 100 for k in range(40)}
    assert display.metrics_line(metrics) == "f1 0.1950 (0.0000 to 0.3900)"
    assert display.losses_line(report(gradients)) == "losses 1 (1 to 1)"


def test_forty_tasks_recorded(tiny, tmp_path, capfd):
    run = trainer.prepare(configure(*tiny("celeba", *BOTH, "track=true", "log_every=1", "log_model=false")), Console(width=120))
    trainer.train(run)
    printed = capfd.readouterr().out
    assert len(printed.splitlines()) < 15
    assert "No delta_m" in printed
    recorded, _ = run_in(tmp_path, "celeba")
    names = set(recorded.data.metrics)
    assert {"cosine/mean", "cosine/min", "conflicts", "cost/waiting", "loss/bald", "weight/young", "final/bald/f1"} <= names
    assert sum(name.startswith("cosine/") for name in names) == 2
    assert "final/delta_m" not in names
    assert 0 < recorded.data.metrics["cost/waiting"] < 1


def run_in(folder, name):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name(f"balance/{name}").experiment_id])
    assert run.info.status == "FINISHED"
    return run, client


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow")
def test_a_network_on_graphs_is_given_back_by_mlflow(tiny, tmp_path, capfd):
    run = trainer.prepare(configure(*tiny("quantum_chemistry", *BOTH, "track=true")), Console(width=200))
    trainer.train(run)
    assert "MLflow serves arrays, not graphs" in capfd.readouterr().out
    recorded, client = run_in(tmp_path, "quantum_chemistry")
    assert [artifact.path for artifact in client.list_artifacts(recorded.info.run_id, "checkpoints")] == [
        "checkpoints/best.pt",
        "checkpoints/last.pt",
    ]
    assert len({used.dataset.digest for used in recorded.inputs.dataset_inputs}) == 3
    (logged,) = client.search_logged_models([recorded.info.experiment_id])
    import mlflow.pytorch

    network = mlflow.pytorch.load_model(logged.artifact_location)
    graphs = run.data.test[[0, 1, 2]][0]
    with torch.no_grad():
        for task, answer in network(graphs).items():
            assert torch.equal(answer, run.model(graphs)[task])


@pytest.mark.slow
def test_sweep_baselines_and_table_of_another_experiment(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(estimate, "BUDGET", 0.01)
    words = ["--experiment=toy", f"--output_dir={tmp_path}", "data.steps=3", "train.epochs=1", "log_model=false"]
    assert sweep.main([*words, "--loss_method=ls,famo", "--jobs=1"]) == 0
    assert "stl f1" in capfd.readouterr().out
    assert compare.main(["--experiment=toy", f"--output_dir={tmp_path}", "--table_only", "--format=csv"]) == 0
    assert "famo" in capfd.readouterr().out
    assert baselines.main([*words, "--seeds=1", "--jobs=1", f"--output={tmp_path}/baselines.yaml"]) == 0
    assert set(reference.read_file(tmp_path / "baselines.yaml")[0].metrics) == {"f1/above_bound", "f2/above_bound"}


def test_the_first_baselines_of_an_experiment(tmp_path, monkeypatch):
    """Its runs look for the file that they are made for."""
    (tmp_path / "toy").mkdir()
    shutil.copy(experiment.FOLDER / "toy" / "config.yaml", tmp_path / "toy")
    monkeypatch.setattr(experiment, "FOLDER", tmp_path)
    words = ["--experiment=toy", f"--output_dir={tmp_path}/runs", "data.steps=3", "train.epochs=1", "log_model=false"]
    file = tmp_path / "toy" / "baselines.yaml"
    assert baselines.main([*words, "--seeds=1", "--jobs=1", f"--output={file}"]) == 0
    assert set(reference.shipped("toy")[0].metrics) == {"f1/above_bound", "f2/above_bound"}


def test_baselines_that_cannot_be_written_cost_no_run(tmp_path, capsys):
    words = ["--experiment=toy", f"--output_dir={tmp_path}/runs", f"--output={tmp_path}/missing/baselines.yaml"]
    with pytest.raises(SystemExit, match="2"):
        baselines.main(words)
    assert "missing/baselines.yaml" in capsys.readouterr().err


def test_a_sweep_without_baselines(tmp_path, capfd):
    words = ["--experiment=regression100", f"--output_dir={tmp_path}", "train.epochs=1", "--no_baselines", "--dry_run"]
    assert sweep.main(words) == 0
    assert "1 runs to do" in capfd.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(words, capsys, tmp_path):
    """The message of a command that is refused, and leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        trainer.main(words)
    assert caught.value.code == 2
    assert not (tmp_path / "runs").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def reshaped(file):
    np.save(file, np.load(file)[:-1])


DAMAGE = [
    ("nyuv2", "train/depth/3.npy", lambda file: file.unlink(), "is missing"),
    ("nyuv2", "val/normal/1.npy", cut, "Was it cut off?"),
    ("cityscapes", "train/image/0.npy", cut, "Was it cut off?"),
    ("cityscapes", "train/label_7/2.npy", reshaped, "must have shape (32, 48)"),
    ("celeba", "Anno/list_attr_celeba.txt", lambda file: file.unlink(), "list_attr_celeba.txt"),
    ("celeba", "Img/img_align_celeba/000002.jpg", lambda file: file.write_bytes(b"no image"), "000002.jpg"),
    ("multimnist", "t10k-labels-idx1-ubyte", cut, "is truncated"),
    ("quantum_chemistry", "raw/gdb9.sdf", cut, "is truncated"),
    ("quantum_chemistry", "raw/uncharacterized.txt", lambda file: file.unlink(), "uncharacterized.txt"),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), DAMAGE, ids=[file for _, file, *_ in DAMAGE])
def test_a_damaged_file_is_named_and_costs_nothing(name, file, change, message, on_disk, capsys, tmp_path):
    words = on_disk(name)
    change(tmp_path / name / file)
    error = refused(words, capsys, tmp_path)
    assert file.rpartition("/")[2] in error
    assert message in error


@pytest.mark.parametrize("name", ON_DISK)
def test_a_folder_that_is_not_there(name, capsys, tmp_path):
    words = [f"--experiment={name}", f"data.path={tmp_path}/nowhere", f"output_dir={tmp_path}/runs"]
    assert f"{tmp_path}/nowhere" in refused(words, capsys, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=paper"], "'digits' has no protocol=paper"),
        (["protocol=papers"], "does not fit 'protocol'"),
        (["--experiment=nyuv2", "data.protocol=paper"], "give protocol=paper alone"),
        (["--experiment=nyuv2", *DENSE, "model.name=mtann"], "Did you mean 'mtan'?"),
        (["--experiment=nyuv2", "modell.name=mtan"], "Unknown key 'modell'"),
        (["--experiment=nyuv2", "data.source=files"], "needs data.path=FOLDER"),
        (["--experiment=multimnist", "protocol=paper"], "protocol=paper is of MNIST: give data.path=FOLDER"),
        (["--experiment=multimnist", "data.source=mnist"], "go together"),
        (["data.path=somewhere"], "Unknown key 'data.path'"),
        (["train.num_workers=1"], "train.num_workers must be 0 for this data"),
        (["train.max_norm=0"], "train.max_norm must be positive, but got 0.0. null turns clipping off."),
        (["train.num_workers=-1"], "train.num_workers must not be negative"),
        (["train.eval_batch_size=0"], "train.eval_batch_size must be at least 1"),
        (["train.factor=1"], "train.factor must be between 0 and 1"),
        (["train.report_last=31"], "train.report_last must be at most train.epochs=30"),
    ],
)
def test_mistakes_in_the_command(words, message, capsys, tmp_path):
    assert message in refused([*words, f"output_dir={tmp_path}/runs"], capsys, tmp_path)


def test_a_library_that_is_not_installed(capsys, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.startswith("experiments.problems.quantum_chemistry")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    words = ["--experiment=quantum_chemistry", f"output_dir={tmp_path}/runs"]
    assert "pip install 'mtl-balance[graph]'" in refused(words, capsys, tmp_path)


def test_any_other_library_that_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(experiment, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"'celeba' needs PIL: pip install 'mtl-balance\[experiments\]'"):
        experiment.find("celeba")
