import subprocess
import sys

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
)


def test_import_balance_is_light():
    code = f"import sys, balance; print(*(set({HEAVY}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not found


def test_base_install_needs_torch_and_scipy_only():
    from importlib.metadata import requires

    base = [line for line in requires("mtl-balance") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in base) == ["scipy", "torch"]
