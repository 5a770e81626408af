"""The wheel and the source distribution: their files, their long description, and how they install."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import balance

ROOT = Path(__file__).parents[1]
MADE = shutil.ignore_patterns(
    ".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "mlflow.db", "mlruns"
)
REPOSITORY = "https://github.com/mtl-balance/balance"
PICTURES = "https://raw.githubusercontent.com/mtl-balance/balance/main/"
TARGET = re.compile(r"(?<![\w!)\]])!?\[(?:!\[[^\]]*\]\([^)]*\)|[^\]]*)\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"")
FENCED = re.compile(r"```.*?```", flags=re.DOTALL)


def run(*command, folder, path=None):
    """Run a command in a folder, without the paths of this process, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build a source distribution from a copy of the project, and a wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "tree", ignore=MADE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree", folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def sdist(dist, tmp_path_factory):
    """Unpack the source distribution."""
    (file,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / file.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def description(wheel):
    """Return the long description, as the package index gets it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name).decode().split("\n\n", 1)[1]


def targets(markdown):
    """Return the addresses of links and pictures outside of code."""
    prose = re.sub(r"`[^`\n]*`", "`code`", FENCED.sub("", markdown))
    return [first or second for first, second in TARGET.findall(prose)]


def test_twine_accepts_both(dist):
    assert run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), folder=dist).count("PASSED") == 2


def test_names_have_the_version(dist):
    names = {f"mtl_balance-{balance.__version__}-py3-none-any.whl", f"mtl_balance-{balance.__version__}.tar.gz"}
    assert {file.name for file in dist.iterdir()} == names


def test_wheel_contains_the_files_of_the_library_and_no_others(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "balance").rglob("*") if path.is_file()}
    expected = {name for name in expected if not name.endswith(".pyc")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        contents = b"\n".join(archive.read(name) for name in archive.namelist())
    assert names == expected
    assert "balance/py.typed" in names
    assert not re.search(rb"(?<![\w.])/(?:home|root|Users)/\w", contents)
    assert str(wheel.parents[1]).encode() not in contents
    assert str(ROOT).encode() not in contents


def test_source_distribution_contains_what_a_clone_contains(sdist):
    folders = ("balance", "tests", "docs", "experiments", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    expected = {name for name in expected if not name.startswith(("docs/methods/loss/", "docs/methods/gradient/"))}  # generated
    expected |= {path.name for path in ROOT.glob("[A-Z]*") if path.is_file()}  # README.md, Makefile, LICENSE, ...
    expected |= {"conftest.py", "constraints.txt", "constraints-oldest.txt", "pyproject.toml", ".gitignore"}
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert expected <= packed
    assert not [name for name in packed if name.endswith(".pyc") or name.startswith((".git/", "runs/", "build/"))]


@pytest.mark.slow
def test_tests_run_in_the_source_distribution(sdist):
    selection = ("tests/test_metrics.py", "tests/solvers", "tests/test_structure.py", "balance/metrics.py")
    report = run(sys.executable, "-m", "pytest", "-q", *selection, folder=sdist, path=sdist)
    assert re.search(r"\d+ passed", report)
    assert run(sys.executable, "-c", "import balance; print(balance.__file__)", folder=sdist, path=sdist).startswith(str(sdist))


@pytest.mark.slow
def test_wheel_installs_and_runs_without_the_project(wheel, tmp_path):
    """The environment has no packages but the wheel, and finds torch and scipy where this process finds them."""
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    (packages,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    others = "\n".join(path for path in sys.path if path.endswith("site-packages"))
    (packages / "others.pth").write_text(others, encoding="utf-8")
    code = "import balance, importlib.metadata as m; print(balance.__file__, balance.__version__, m.version('mtl-balance'))"
    file, *versions = run(python, "-c", code, folder=tmp_path).split()
    assert file == str(packages / "balance" / "__init__.py")
    assert versions == [balance.__version__] * 2
    assert run(python, "-m", "balance", "methods", "pcgrad", folder=tmp_path).startswith("pcgrad: ")


def test_long_description_has_absolute_links_only(description):
    found = targets(description)
    assert found
    assert [target for target in found if not target.startswith(("https://", "http://", "mailto:"))] == []


def test_long_description_keeps_the_code_of_the_readme(description):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert FENCED.findall(description) == FENCED.findall(readme)


def test_links_of_the_long_description_lead_to_files(description):
    for target in targets(description):
        for begin in (PICTURES, f"{REPOSITORY}/blob/main/"):
            if target.startswith(begin):
                assert (ROOT / target.removeprefix(begin).partition("#")[0]).exists(), target


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("![a](b/c.png)", f"![a]({PICTURES}b/c.png)"),
        ('<img alt="a" src="b.png">', f'<img alt="a" src="{PICTURES}b.png">'),
        ("See [a `b`](docs/c.md#d).", f"See [a `b`]({REPOSITORY}/blob/main/docs/c.md#d)."),
        ("[![a](b.svg)](c.yml)", f"[![a]({PICTURES}b.svg)]({REPOSITORY}/blob/main/c.yml)"),
        ("[a](#part)", f"[a]({REPOSITORY}#part)"),
        ("[a](https://b.org) ![c](https://d.org/e.png)", "[a](https://b.org) ![c](https://d.org/e.png)"),
        ('x = heads["depth"](features)', 'x = heads["depth"](features)'),
        ("layers[0][1](x) + f(x)[2](y)", "layers[0][1](x) + f(x)[2](y)"),
    ],
)
def test_relative_links_become_absolute(markdown, expected):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    substitutions = re.findall(r"^pattern = '(.*)'\nreplacement = '(.*)'$", text, flags=re.MULTILINE)
    assert len(substitutions) == 4
    for pattern, replacement in substitutions:
        markdown = re.sub(pattern, replacement, markdown)
    assert markdown == expected
