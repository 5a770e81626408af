import shutil
import subprocess
import sys

import pytest

from tests.experiments.short_runs import DIGITS, ON_DISK, ROOT, TINY
from tests.writers.celeba import write_celeba
from tests.writers.dense import write_cityscapes, write_nyuv2
from tests.writers.mftcoder import write_mftcoder
from tests.writers.mnist import write_mnist
from tests.writers.qm9 import write_qm9


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(cache, tmp_path):
    """Words for a short run of an experiment on the data that ships with it; nothing recorded unless said otherwise."""

    def words(name, *more):
        cached = [f"data.cache={cache}"] if name in ("nyuv2", "cityscapes", "celeba", "llm") else []
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
    write_nyuv2(root / "nyuv2", {"train": 5, "val": 2})
    write_cityscapes(root / "cityscapes", {"train": 5, "val": 2})
    write_celeba(root / "celeba")
    write_mnist(root / "multimnist")
    write_qm9(root / "quantum_chemistry", count=8)
    write_mftcoder(root / "llm")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def on_disk(folders, cache, tmp_path):
    """Words for a short run of an experiment on its own data set."""

    def words(name, *more, folder=None):
        if name == "quantum_chemistry":
            pytest.importorskip("rdkit")
        path = shutil.copytree(folders[name], tmp_path / name) if folder is None else folder
        cached = [f"data.cache={cache}"] if name in ("celeba", "llm") else []
        start = [f"--experiment={name}", f"output_dir={tmp_path}/runs", "train.epochs=1", "track=false", f"data.path={path}"]
        return [*start, *cached, *ON_DISK[name], *more]

    return words


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """One small run of the main job, as a user starts it, from a directory outside the project."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(ROOT / "experiments/trainer.py"), "--loss_method=go4align", "--gradient_method=pcgrad"]
    before = source_files()
    done = subprocess.run([*command, *DIGITS, "seed=4"], cwd=folder, capture_output=True, text=True, check=True)
    assert source_files() == before
    return folder, done.stdout


def source_files():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {name: (ROOT / name).stat().st_mtime_ns for name in listed.stdout.split() if (ROOT / name).exists()}
