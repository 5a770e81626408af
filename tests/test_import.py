import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEP = """
import sys
import renamed, torch

w = torch.ones(2, requires_grad=True)
balancer = renamed.Balancer(2, loss="uw", gradient="pcgrad")
balancer.backward(torch.stack([w.sum(), (3 * w - 1).square().sum()]), shared=[w])
renamed.testing, renamed.metrics
print(type(balancer).__module__)
print(renamed.compare.__module__)
print([name for name in sys.modules if name.partition(".")[0] == "balance"])
"""
HEAVY = (
    "mlflow",
    "omegaconf",
    "cvxpy",
    "sklearn",
    "torch_geometric",
    "matplotlib",
    "rich",
    "torchmetrics",
    "joblib",
    "yaml",
    "lightning",
    "transformers",
    "accelerate",
    "peft",
    "tensorboard",
    "wandb",
    "jinja2",
)


def test_import_balance_is_light():
    code = f"import sys, balance; print(*(set({HEAVY}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not found


def test_the_import_name_is_the_name_of_the_folder(tmp_path):
    """A copy of the library in a folder with another name works, next to the original."""
    shutil.copytree(ROOT / "balance", tmp_path / "renamed", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "step.py").write_text(STEP, encoding="utf-8")
    code = [sys.executable, "step.py"]
    printed = subprocess.run(code, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    assert printed == ["renamed.stage.balancer", "renamed.comparison.comparison", "[]"]


def test_base_install_needs_torch_and_scipy_only():
    from importlib.metadata import requires

    base = [line for line in requires("mtl-balance") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in base) == ["scipy", "torch"]


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("testing", "hypothesis", "testing"),
        ("config", "omegaconf", "config"),
        ("integrations.lightning", "lightning", "lightning"),
        ("integrations.transformers", "transformers", "transformers"),
    ],
)
def test_a_module_whose_package_is_missing_names_its_extra(module, package, extra):
    code = f"""
import importlib, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "{package}" else find(name, *rest)
try:
    importlib.import_module("balance.{module}")
except ModuleNotFoundError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"{package} is required but not installed. Use pip install 'mtl-balance[{extra}]'." in printed
