"""A new method is a function, a row of claims, a row of references and a line in the changelog, and nothing else.

The methods are added to a copy of the project, whose tests then run in other processes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("__init__.py", "conftest.py", "golden.json", "golden_sequences.json", "readme_sections.py"),
    *("test_claims.py", "test_methods.py", "test_readme_sections.py"),
    *("claims/__init__.py", "claims/gradient.py", "claims/loss.py"),
    *("references/__init__.py", "references/conftest.py", "references/test_gradient.py", "references/test_loss.py"),
    "references/test_more_losses.py",
    "references/test_sequences.py",
    *(
        "rules/__init__.py",
        "rules/test_registry.py",
        "gradient/__init__.py",
        "gradient/directions.py",
        "gradient/test_rules.py",
    ),
)

GRADIENT_BALANCER = '''

@gradient_balancers.register(
    "harmonic",
    label="Harmonic",
    paper="Doe 2030, https://example.org/harmonic",
    remedies=("gradient length",),
    invariances=(
        "permutation_equivariant",
        "rotation_equivariant",
        "unchanged_by_scaling_one_task",
        "scales_with_the_gradients",
    ),
)
def harmonic(gramian: Gramian, *, power: float = 1.0) -> Weights:
    """Return weights on the simplex that are inversely proportional to the lengths of the task gradients.

    Args:
        gramian: Inner products of the task gradients. Shape (K, K).
        power: Exponent of the lengths.
    """

    def weights(G: Array) -> Array:
        norms = np.sqrt(np.diag(G))
        inverse = np.divide(1, norms**power, out=np.zeros_like(norms), where=norms > 0)
        return inverse / inverse.sum() if inverse.any() else np.full(len(G), 1 / len(G))

    return solve(weights, gramian)
'''
LOSS_BALANCER = '''

@loss_balancers.register(
    "halved",
    label="Halved",
    paper="Roe 2031, https://example.org/half",
    remedies=("loss scale",),
    invariances=("loss_permutation_equivariant", "separable"),
)
def halved(losses: Losses) -> WeightedLosses:
    """Return one half of the losses."""
    return losses / 2
'''
GRADIENT_CLAIMS = """
    "harmonic": ON_GRAMIANS
    | {
        "on_simplex": True,
        "conflict_free": [[1.0, 0.0], [-1.0, 0.5], [-1.0, -0.5]],
        "unchanged_by_scaling_one_task": True,
        "equal_projections": [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
    },"""
ADDED_TEST = """
import pytest
import torch

import balance
from tests import readme_sections


def test_both_methods_have_pages(monkeypatch):
    monkeypatch.syspath_prepend(readme_sections.ROOT / "docs/_ext")
    from method_pages import SECTIONS, page

    text = page("gradient", "harmonic")
    assert all(f"## {title}" in text for title in SECTIONS)
    assert "Exponent of the lengths." in text
    assert "conflict free: " in text.split("**Refuted")[1]
    assert "Roe 2031" in page("loss", "halved")


def test_stage_builds_both_methods():
    theta = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    stage = balance.Balancer(2, loss="halved", gradient="harmonic")
    report = stage.backward(torch.stack([3 * theta[0] + 1, theta[1] + 5]), shared=[theta])
    assert report.weighted_losses.tolist() == [2, 2]
    assert theta.grad.tolist() == pytest.approx([0.375, 0.375])


def test_diagnosis_recommends_both_methods():
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def losses(batch):
        return {"small": batch * (theta[0] - 1).square(), "large": 1000 * batch * (theta[1] - 5).square()}

    options = {"loss_methods": ["halved"], "gradient_methods": ["harmonic"]}
    diagnosis = balance.diagnose(losses, [1.0, 2.0], model=torch.nn.Linear(1, 1), shared=[theta], lr=1e-4, **options)
    assert (diagnosis.loss_methods, diagnosis.gradient_methods) == (("halved",), ("harmonic",))


def test_readme_lists_both_methods():
    text = (readme_sections.ROOT / "README.md").read_text(encoding="utf-8")
    assert ".py) | Halved, [Roe 2031](https://example.org/half) | loss scale | - |" in text
    assert ".py) | Harmonic, [Doe 2030](https://example.org/harmonic) | gradient length | - |" in text
"""


def insert(path, marker, text):
    """Put text behind the only occurrence of a marker."""
    content = path.read_text(encoding="utf-8")
    assert content.count(marker) == 1
    path.write_text(content.replace(marker, marker + text), encoding="utf-8")


def append(path, text):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.fixture
def copy(tmp_path):
    """A copy of the project with two further methods, without rows, references and changelog."""
    for package in ("balance", "experiments"):  # the tree in CONTRIBUTING.md lists both
        python_only = shutil.ignore_patterns("__pycache__", "*.npz", "*.png", "*.yaml", "*.html")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=python_only)
    shutil.copytree(ROOT / "docs/_ext", tmp_path / "docs/_ext", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in SOURCES:
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    append(tmp_path / "balance/gradient/min_norm.py", GRADIENT_BALANCER)
    append(tmp_path / "balance/loss/scale.py", LOSS_BALANCER)
    return tmp_path


def python(copy, *words):
    """Run a command on the copy, and return its exit code and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_function_without_rows_and_line_is_refused(copy):
    code, printed = python(copy, "-m", "pytest", "-q", "tests/test_methods.py", "tests/test_readme_sections.py")
    assert code == 1
    failed = set(re.findall(r"^FAILED tests/(\S+)", printed, flags=re.MULTILINE))
    demands = {"row_of_claims", "row_of_references", "line_in_the_changelog"}
    missing = {f"test_methods.py::test_method_has_a_{what}[{name}]" for what in demands for name in ("harmonic", "halved")}
    assert failed == {*missing, "test_readme_sections.py::test_files_have_the_generated_sections[README.md]"}


def test_function_two_rows_and_a_line_are_all_that_a_method_needs(copy):
    insert(copy / "tests/claims/gradient.py", "GRADIENT_ROWS = {", GRADIENT_CLAIMS)
    insert(copy / "tests/claims/loss.py", "LOSS_ROWS = {", '\n    "halved": ALWAYS,')
    row = '\n    ("harmonic", {}, [[1.0, 0.0], [0.0, 3.0]], [0.75, 0.75]),'
    insert(copy / "tests/references/test_gradient.py", "DIRECTIONS = [", row)
    insert(copy / "tests/references/test_loss.py", "WEIGHTED_LOSSES = [", '\n    ("halved", {}, [1.0, 2.0], [0.5, 1.0]),')
    append(copy / "CHANGELOG.md", "\n- The gradient balancer `harmonic` and the loss balancer `halved`.\n")
    (copy / "tests/test_added.py").write_text(ADDED_TEST, encoding="utf-8")

    assert python(copy, "tests/readme_sections.py", "--write") == (0, "")
    selected = "harmonic or halved or test_every or test_added or test_readme_sections or test_registry"
    code, printed = python(copy, "-m", "pytest", "-q", "-k", selected, "tests")
    assert code == 0, printed
