"""Another package of the import name ``balance``: an installation of both in one folder is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from balance.messages import refuse_mixed_installation

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "balance").mkdir()
    (tmp_path / "balance" / "__init__.py").touch()
    return tmp_path / "balance"


def record(folder, distribution, *files):
    (folder.parent / distribution).mkdir()
    lines = "".join(f"{file},sha256=0,1\n" for file in files)
    (folder.parent / distribution / "RECORD").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("name", ["sample_class.py", "weighting_methods"])
def test_files_of_the_other_package_are_refused(folder, name):
    (folder / name).mkdir()
    with pytest.raises(ImportError, match=r"weights surveys.* pip uninstall balance mtl-balance, and install each"):
        refuse_mixed_installation(folder)


def test_another_distribution_with_our_file_is_refused(folder):
    record(folder, "balance-0.99.0.dist-info", "balance/__init__.py", "balance/new.py")
    with pytest.raises(ImportError, match="must contain mtl-balance only"):
        refuse_mixed_installation(folder)


def test_the_library_without_the_other_is_accepted(folder):
    record(folder, "mtl_balance-0.1.0.dist-info", "balance/__init__.py")
    record(folder, "balance_sheet-1.0.dist-info", "balance/__init__.py")
    record(folder, "balance-2.0.dist-info", "other/__init__.py")
    refuse_mixed_installation(folder)


def test_a_renamed_copy_next_to_the_other_package_is_accepted(folder):
    record(folder, "balance-0.99.0.dist-info", "balance/__init__.py")
    copy = folder.rename(folder.with_name("renamed"))
    refuse_mixed_installation(copy)


def test_import_of_a_mixed_folder_fails(tmp_path):
    shutil.copytree(ROOT / "balance", tmp_path / "balance", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "balance" / "sample_class.py").touch()
    command = [sys.executable, "-c", "import balance"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "install each of them in its own environment" in done.stderr
