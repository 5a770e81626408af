import json
import re
import subprocess
import sys
from pathlib import Path

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


def test_the_wheel_has_every_file_of_the_library():
    """Files other than modules are in the wheel only if they are listed."""
    root = Path(__file__).parents[1]
    others = [path for path in (root / "balance").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    (listed,) = re.findall(r"^balance = (\[.*\])$", (root / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(json.loads(listed)) == sorted(path.relative_to(root / "balance").as_posix() for path in others)


def test_base_install_needs_torch_and_scipy_only():
    from importlib.metadata import requires

    base = [line for line in requires("mtl-balance") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in base) == ["scipy", "torch"]
