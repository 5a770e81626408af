"""Change the sources in small ways and count the changes that a test notices; see MUTATION.md.

python tests/mutation.py balance/loss           a seeded sample of the mutants of a folder
python tests/mutation.py balance/loss --again   its survivors, after a change of the tests

A mutant runs on a copy of the project, in a fork of a process that has imported torch. Only tests that call the changed
function run, from fast to slow, until the first failure.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # source folder -> tests that run if they call the changed function
    "balance/solvers": [
        "tests/solvers",
        "tests/gradient",
        "tests/loss/test_groups.py",
        "tests/test_claims.py",
        "tests/references",
    ],
    "balance/loss": ["tests/loss", "tests/test_claims.py", "tests/references"],
    "balance/gradient": ["tests/gradient", "tests/test_claims.py", "tests/references"],
    "balance/rules": [
        "tests/rules",
        "tests/loss",
        "tests/gradient",
        "tests/references",
        "tests/stage/test_arguments.py",
    ],
    "balance/stage": ["tests/stage"],
}
UNMEASURED = ["balance/stage/over_ranks.py", "balance/stage/plain_step_over_ranks.py"]  # their tests start processes
LEFT_OUT = ["tests/stage/test_graphs.py", "tests/stage/test_pareto_set.py"]  # slow
PRELOADED = [
    "torch.func",
    "torch.distributed",
    "scipy.optimize",
    "scipy.linalg",
    "hypothesis",
    "cvxpy",
    "omegaconf",
    "sklearn.cluster",
]
SLOWEST, SECONDS = 4.0, 8.0  # slower tests are left out; tests of a mutant take this long together
LIMIT = 60  # seconds of processor time for the tests of a mutant
MEMORY = 8 << 30
UNSEEN = ("__repr__", "__str__", "extra_repr")
ALIKE = ({"Is", "Eq"}, {"IsNot", "NotEq"})  # no difference between objects that are equal only to themselves


class Mutant(NamedTuple):
    path: str
    line: int
    operator: str
    occurrence: int

    def code(self) -> str:
        source = (ROOT / self.path).read_text(encoding="utf-8")
        return mutate_code(source, get_operator(f"core/{self.operator}")(), self.occurrence)

    def difference(self) -> str:
        before = (ROOT / self.path).read_text(encoding="utf-8").splitlines()
        pairs = zip(before, self.code().splitlines(), strict=False)
        return next((f"{old.strip()}  ->  {new.strip()}" for old, new in pairs if old != new), "")


# Mutants


def excluded(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the spans of annotations, messages, asserts, stubs, and of blocks for type checkers."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            nodes.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            nodes.append(node.annotation)
        if is_excluded(node):
            nodes.append(node)
    return [(first_position(node), (node.end_lineno, node.end_col_offset)) for node in nodes if node is not None]


def is_excluded(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in UNSEEN or ast.unparse(node.body[-1]) == "..."
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in {"warnings.warn", "cast", "TypeVar"}
    return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr)


def first_position(node: ast.AST) -> tuple[int, int]:
    """Return the position of a node, or of its first decorator."""
    positions = [(part.lineno, part.col_offset - (part is not node)) for part in [node, *getattr(node, "decorator_list", [])]]
    return min(positions)


def sites(path: str) -> dict[Any, list[Mutant]]:
    """Return the mutants of a file, grouped by place and kind of operator."""
    source = (ROOT / path).read_text(encoding="utf-8")
    spans, nodes, groups = excluded(source), list(ast_nodes(get_ast(source))), {}
    for name in sorted(operator.removeprefix("core/") for operator in operator_names()):
        kind, *change = name.split("_")
        if kind in {"NoOp", "VariableReplacer", "VariableInserter"} or set(change) in ALIKE:
            continue
        operator = get_operator(f"core/{name}")()
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, stop) in enumerate(positions):
            if not any(first <= start and stop <= last for first, last in spans):
                groups.setdefault((path, start, kind), []).append(Mutant(path, start[0], name, occurrence))
    return groups


def sample(folder: str, number: int, seed: int) -> list[Mutant]:
    """Draw places without replacement, and a mutant for each."""
    draw = random.Random(seed)
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py"))
    groups = {place: mutants for path in files if path not in UNMEASURED for place, mutants in sites(path).items()}
    places = sorted(groups)
    draw.shuffle(places)
    chosen = (draw.choice(groups[place]) for place in places)
    return list(islice(filter(is_valid, chosen), number))


def is_valid(mutant: Mutant) -> bool:
    try:
        return ast.unparse(ast.parse(mutant.code())) != ast.unparse(ast.parse((ROOT / mutant.path).read_text("utf-8")))
    except SyntaxError:
        return False


@cache
def functions(path: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def function_around(mutant: Mutant) -> range | None:
    """Return the lines of the innermost function whose body is changed, from its decorators on."""
    around = [
        (function.end_lineno - function.lineno, function)
        for function in functions(mutant.path)
        if first_position(function)[0] <= mutant.line <= function.end_lineno
    ]
    if not around:
        return None
    function = min(around, key=lambda pair: pair[0])[1]
    if mutant.line < function.body[0].lineno:  # a default or a decorator, which act where the function is defined
        return None
    return range(first_position(function)[0], function.end_lineno + 1)


# Runs


class Recorder:
    """Plugin that stores, for each test, its processor time and the functions of `balance` that it calls."""

    def __init__(self, folder: Path) -> None:
        self.prefix = f"{folder}/balance/"
        self.start = len(f"{folder}/")
        self.tests: dict[str, tuple[float, list[tuple[str, int]]]] = {}
        self.failures: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        called, begin = set(), time.process_time()

        def trace(frame, event, argument):
            if frame.f_code.co_filename.startswith(self.prefix):
                called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

        sys.settrace(trace)
        result = yield
        sys.settrace(None)
        calls = [(name[self.start :], line) for name, line in called]
        self.tests[item.nodeid] = time.process_time() - begin, calls
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failures.append(report.nodeid)


class Selection:
    """Plugin that runs the given tests in the given order."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda item: self.place[item.nodeid])


def in_fork(folder: Path, arguments: list[str], plugin: Any, limit: int, result: Path | None = None) -> int:
    """Run pytest in a fork with a limit of processor time. Return its exit status; negative is the signal that ended it."""
    child = os.fork()
    if not child:
        status = 99
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.path[0] = str(folder)
            with Path(folder, "output.txt").open("w", encoding="utf-8") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            status = int(pytest.main(["-q", "-p", "no:faulthandler", "--assert=plain", "--tb=line", *arguments], [plugin]))
            if result is not None:
                result.write_text(json.dumps([plugin.tests, plugin.failures]), encoding="utf-8")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Project:
    """Copy of the project, and its tests with the functions that they call."""

    def __init__(self, folder: Path, tests: list[str], store: Path) -> None:
        self.folder = folder
        stored = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
        patterns = [test if test.endswith(".py") else f"{test}/test_*.py" for test in tests]
        paths = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
        files = [path for path in paths if str(path.relative_to(folder)) not in LEFT_OUT]
        sources = b"".join(path.read_bytes() for path in sorted((folder / "balance").rglob("*.py")))
        keys = {path: hashlib.sha256(path.read_bytes() + sources).hexdigest() for path in files}
        new = [path for path in files if keys[path] not in stored]
        result = folder / "tests.json"
        if new:
            in_fork(folder, [str(path.relative_to(folder)) for path in new], Recorder(folder), 3600, result)
            recorded, failures = json.loads(result.read_text(encoding="utf-8"))
            print("Left out, since they fail without a mutant:", *failures)
            for path in new:
                prefix = f"{path.relative_to(folder)}::"
                stored[keys[path]] = {n: t for n, t in recorded.items() if n.startswith(prefix) and n not in failures}
            store.write_text(json.dumps(stored), encoding="utf-8")
        self.tests = {name: test for path in files for name, test in stored[keys[path]].items()}

    def tests_for(self, mutant: Mutant) -> list[str]:
        around, mirror = function_around(mutant), mutant.path.replace("balance/", "tests/").rpartition("/")[0]
        chosen = sorted(
            (not name.startswith(mirror), seconds, name)
            for name, (seconds, calls) in self.tests.items()
            if seconds <= SLOWEST and (around is None or any(path == mutant.path and line in around for path, line in calls))
        )
        names, total = [], 0.0
        for _, seconds, name in chosen:
            total += seconds
            if total > SECONDS:
                break
            names.append(name)
        return names

    def outcome(self, mutant: Mutant) -> str:
        names = self.tests_for(mutant)
        if not names:
            return "survived"
        path = self.folder / mutant.path
        path.write_text(mutant.code(), encoding="utf-8")
        files = sorted({name.partition("::")[0] for name in names})
        try:
            status = in_fork(self.folder, ["-x", *files], Selection(names), LIMIT)
        finally:
            shutil.copy2(ROOT / mutant.path, path)
        return "survived" if status == 0 else "timeout" if status < 0 else "killed"


# Score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=100, help="mutants per folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path("runs/mutation.jsonl"), help="outcomes; mutants in it are skipped")
    parser.add_argument("--again", action="store_true", help="run again what the record does not list as killed")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutation", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        import_module(name)
    for folder in options.folders:
        score(folder, sample(folder, options.sample, options.seed), options.record, again=options.again)
    return 0


def score(folder: str, mutants: list[Mutant], record: Path, *, again: bool) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    entries = [json.loads(line) for line in lines]
    outcomes = {Mutant(*entry["mutant"]): entry["outcome"] for entry in entries}
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        copy = Path(name).resolve() / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        compileall.compile_dir(copy / "balance", quiet=1)
        compileall.compile_dir(copy / "tests", quiet=1)
        os.environ["PYTHONPATH"] = str(copy)
        project = Project(copy, TESTS[folder], record.with_suffix(".tests.json"))
        for mutant in mutants:
            if mutant not in outcomes or (again and outcomes[mutant] != "killed"):
                begin = time.monotonic()
                outcomes[mutant] = project.outcome(mutant)
                entry = {"mutant": mutant, "outcome": outcomes[mutant], "difference": mutant.difference()}
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry | {"seconds": round(time.monotonic() - begin, 1)}) + "\n")
    survivors = [mutant for mutant in mutants if outcomes[mutant] == "survived"]
    for mutant in sorted(survivors):
        print(f"{mutant.path}:{mutant.line}: {mutant.operator}: {mutant.difference()}")
    killed = len(mutants) - len(survivors)
    print(f"{folder}: {killed} of {len(mutants)} mutants killed, {killed / len(mutants):.0%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
