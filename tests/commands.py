"""Commands on the pages of this project, and checks of a command that run nothing.

Every command line in a block of bash is a command, and so is every program of `experiments` in single backticks.
"""

import itertools
import re
import shlex
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from balance import catalogue
from balance.config import build_balancer, flatten
from experiments import baselines, compare, diagnose, front, study, sweep, trainer
from experiments.analysis import published_tables
from experiments.cli import all_overrides, parse_seeds
from experiments.config.layers import AUTO, configure, values_by_key
from experiments.problems import base as problems
from experiments.problems.burgers import __main__ as burgers
from experiments.problems.toy import __main__ as toy
from experiments.sweeps import fan
from experiments.sweeps.plan import baseline_jobs, grid_jobs

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("README.md", "CONTRIBUTING.md", "experiments/README.md", "docs/**/*.md")
    for page in ROOT.glob(pattern)
    if page.relative_to(ROOT).parts[:2] != ("docs", "methods")  # generated
)
BLOCK = re.compile(r"^```bash\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`(python (?:experiments/|-m (?:balance |experiments\.))[^`]*)`(?!`)")
# Started by other tests, or tools for contributors
UNCHECKED = ("cd", "codespell", "dask", "export", "git", "mypy", "pre-commit", "ray", "ruff", "source", "sphinx-build")
OF_PAGES = ("bits", "my-model")  # experiments that a page adds
MOST = 6  # configurations of a sweep that are built; all of the largest file are in test_methods_of_digits.py
NEEDS = {"quantum_chemistry": "torch_geometric", "llm": "transformers"}


def commands():
    """Every command, and the page on which it is found first."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for command in (*in_blocks(text), *(" ".join(words.split()) for words in INLINE.findall(text))):
            found.setdefault(command, page.relative_to(ROOT).as_posix())
    return found


def in_blocks(text):
    """The commands in blocks of bash, without comments."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.sub(r"(^|\s+)#\s.*", "", line).split("&&"):
                if command.strip():
                    yield " ".join(command.split())


def check(command):
    """Fail if a program, an option, a key or a value does not exist."""
    program, *words = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command))
    program = program.removeprefix(".venv/bin/").replace("python3", "python")
    if program in UNCHECKED:
        return
    assert program in CHECKS, f"Add a check of the program {program} to tests/commands.py."
    CHECKS[program](words)


def check_python(words):
    script, *words = words
    is_module = script == "-m"
    if is_module:
        script, *words = words
    assert script in PROGRAMS or (find_spec(script) if is_module else (ROOT / script).is_file()), script
    if script in PROGRAMS and "--help" not in words:
        PROGRAMS[script](words)


def parsed(module, words):
    """The options of a command, and the name of its experiment."""
    options = module.build_parser().parse_intermixed_args(words)
    name = values_by_key(all_overrides(options)).get("experiment", "digits")
    pytest.importorskip(NEEDS.get(name, "torch"))
    return options, name


def check_trainer(words):
    options, name = parsed(trainer, words)
    if options.loss_method == options.gradient_method == AUTO:
        options.loss_method, options.gradient_method = "ls", "none"  # which a diagnosis replaces
    if name not in OF_PAGES:
        config = configure(all_overrides(options))
        if config.data.get("path") is None:
            build_balancer(config, problems.tasks_of(config))


def check_sweep(words):
    options, name = parsed(sweep, words)
    if name not in OF_PAGES:
        planned = sweep.read_sweep(options)
        some = planned.configurations[:MOST]
        assert grid_jobs(replace(planned, configurations=some, seeds=planned.seeds[:1]))


def check_compare(words):
    options, name = parsed(compare, words)
    assert not options.published or published_tables.for_experiment(name)
    if name not in OF_PAGES:
        config = configure([f"experiment={name}", *options.overrides])
        assert options.per is None or options.per in flatten(config)
        assert set((options.pareto or "").split(",")) - {""} <= set(problems.find(name).metrics())


def check_diagnose(words):
    options, _ = parsed(diagnose, words)
    configure(all_overrides(options))


def check_front(words):
    options, name = parsed(front, words)
    tasks = problems.find(name).TASKS
    pair = tuple(options.tasks.split(",")) if options.tasks else tasks[:2]
    methods = [words.split(",") for words in (options.loss_method or "ls", options.gradient_method or "none")]
    for made, _ in fan.configurations(*methods, options.points, pair, tasks):
        chosen = [f"loss_method={made.loss_method}", f"gradient_method={made.gradient_method}", *made.overrides]
        configure([f"experiment={name}", *chosen, *options.overrides])


def check_study(words):
    options = study.build_parser().parse_intermixed_args(words)
    assert study.read_options(options).problems


def check_baselines(words):
    options, _ = parsed(baselines, words)
    assert baseline_jobs(all_overrides(options), parse_seeds(options.seeds)[:1])


def check_catalogue(words):
    assert words[:1] in ([], ["methods"])
    assert len(words) < 3
    for name in words[1:]:
        assert name == "NAME" or any(name in registry for registry in catalogue.REGISTRIES.values()), name


def check_torchrun(words):
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    if options.training_script in PROGRAMS:
        check_python([options.training_script, *options.training_script_args])


def check_make(words):
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def check_pip(words):
    """Groups of dependencies and extras exist."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = dict(re.findall(r"^\[([\w.-]+)\]\n(.*?)(?=^\[[\w.-]+\]\n|\Z)", project, flags=re.DOTALL | re.MULTILINE))
    groups, extras = (
        set(re.findall(r"^([\w-]+) =", tables[name], flags=re.MULTILINE))
        for name in ("dependency-groups", "project.optional-dependencies")
    )
    assert words[0] == "install"
    assert {words[i + 1] for i, word in enumerate(words) if word == "--group"} <= groups
    for requirement in words:
        named = re.match(r"(?:mtl-balance|\.)\[(.*)\]", requirement)
        assert named is None or set(named[1].split(",")) <= extras, requirement


def check_mlflow(words):
    """MLflow has these options; its sources are read, since importing its command line takes long."""
    folder = Path(find_spec("mlflow").origin).parent
    sources = [path.read_text(encoding="utf-8") for path in (folder / "cli/__init__.py", folder / "utils/cli_args.py")]
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert any(f'"{option}"' in source for source in sources), option


def check_pytest(words):
    for word in words:
        assert word.startswith("-") or (ROOT / word.partition("::")[0]).exists(), word


CHECKS = {
    "make": check_make,
    "mlflow": check_mlflow,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "torchrun": check_torchrun,
}
PROGRAMS = {
    "balance": check_catalogue,
    "experiments/baselines.py": check_baselines,
    "experiments/compare.py": check_compare,
    "experiments/diagnose.py": check_diagnose,
    "experiments/front.py": check_front,
    "experiments/study.py": check_study,
    "experiments/sweep.py": check_sweep,
    "experiments/trainer.py": check_trainer,
    "experiments.problems.burgers": lambda words: burgers.build_parser().parse_args(words),
    "experiments.problems.toy": lambda words: toy.build_parser().parse_args(words),
    "pip": check_pip,
    "pytest": check_pytest,
}
