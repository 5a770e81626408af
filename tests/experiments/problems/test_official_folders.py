"""Problems on folders in the layouts in which their data sets are distributed."""

import numpy as np
import pytest
from rich.console import Console

from experiments.problems import base as experiment
from experiments.training import loop, run
from tests.experiments.short_runs import BOTH, ON_DISK, configure, finite_metrics, refused

KINDS = {  # names of the metrics, without the task
    "nyuv2": {"miou", "pixel_accuracy", "abs_error", "rel_error", "mean_angle", "median_angle"}
    | {"within_11.25", "within_22.5", "within_30"},
    "cityscapes": {"miou", "pixel_accuracy", "abs_error", "rel_error"},
    "quantum_chemistry": {"mae"},
    "celeba": {"f1"},
    "multimnist": {"accuracy"},
    "llm": {"loss", "perplexity", "mismatch"},
}


@pytest.mark.parametrize("name", ON_DISK)
def test_it_trains_on_a_folder_in_the_official_layout(name, on_disk):
    config = configure(*on_disk(name, *BOTH))
    assert config.data.source == experiment.find(name).ON_DISK
    final = loop.train(run.prepare(config, Console(quiet=True)))
    assert {metric.partition("/")[2] for metric in finite_metrics(final)} == KINDS[name]


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
    ("llm", "upper.jsonl", cut, "line 30"),
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
