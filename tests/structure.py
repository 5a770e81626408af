"""Measure the structure of the sources: direction of imports, sizes of functions and files, and words that begin docstrings.

python tests/structure.py                     every violation outside TO_DO, and a summary of all counts
python tests/structure.py balance/stage ...   every violation in these files and folders, TO_DO or not
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("balance", "experiments")
FOLDERS = (*MEASURED, "tests", "benchmarks")
MEDIAN, LINES, NESTING, FILE = 5, 30, 3, 400

# Rooms from low to high. A file imports from strictly lower layers and from its own room.
LAYERS = (
    {"balance.types", "balance.messages", "balance.metrics", "balance.profiling"},
    {"balance.solvers", "balance.distributed"},
    {"balance.rules"},
    {"balance.loss", "balance.gradient"},
    {"balance.engine"},
    {"balance.stage"},
    {"balance.splitter"},
    {"balance.diagnosis"},
    {"balance.config", "balance.tracking", "balance.testing"},
    {"balance.comparison", "balance.integrations"},
    {"balance.catalogue"},
    {"balance.__main__"},
    {"balance"},
    {"experiments.datasets"},
    {"experiments.problems"},  # its rooms are ordered by PROBLEMS
    {"experiments.config"},
    {"experiments.recording"},
    {"experiments.analysis"},
    {"experiments.training"},
    {"experiments.sweeps"},
    {"experiments.studies"},
    {"experiments.cli"},
    {f"experiments.{command}" for command in ("trainer", "sweep", "study", "front", "compare", "diagnose", "baselines")},
)
PROBLEMS = ("experiments.problems.base", "experiments.problems.dense")  # every other problem lies above both
FORBIDDEN = {  # although their layers are lower
    "balance.solvers": {"balance.messages", "balance.metrics", "balance.profiling"},
    "balance.engine": {"balance.loss", "balance.gradient"},
}
WITHOUT_QUESTIONS = ("balance/stage/", "balance/splitter/", "balance/rules/compose.py")  # to rules: hasattr, getattr, takes
TYPED_RULES = ("balance/stage/", "balance/splitter/", "balance/rules/", "balance/diagnosis/", "balance/config.py")
QUESTION = re.compile(r"(What|How|Where|Which|Whether|Who)\b")

# Violations that remain, to be emptied: by check, the files or folders ("…/"); for imports, "importer -> imported".
# fmt: off
TO_DO: dict[str, set[str]] = {}
# fmt: on


class Violation(NamedTuple):
    check: str
    path: str
    line: int
    text: str
    entry: str  # under which TO_DO may list it

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.check}: {self.text}"


class Import(NamedTuple):
    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def files(folders: Iterable[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# Imports


@cache
def modules() -> dict[str, Path]:
    """Return the project's modules by name; a package is its ``__init__``."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files(MEASURED)}


def absolute_imports() -> Iterator[Violation]:
    """Yield imports of the library by its own name, which would tie its modules to the name of its folder."""
    for path in files(["balance"]):
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.partition(".")[0] == "balance" for name in names):
                yield _at("direction", path, node, "imports the library by its name; use a relative import")


def imports_of(module: str) -> Iterator[Import]:
    """Yield all imports of project modules, also those within functions and for type checkers."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            within = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else origin for name in within]
        else:
            continue
        yield from (Import(module, name, node.lineno) for name in dict.fromkeys(names) if name in modules())


@cache
def imports() -> tuple[Import, ...]:
    return tuple(edge for module in modules() for edge in imports_of(module))


def room(module: str) -> str:
    """Return the folder of a module; files next to the folders are rooms, and so is every problem."""
    depth = 3 if module.startswith("experiments.problems") else 2
    return ".".join(module.split(".")[:depth])


def layer(name: str) -> tuple[int, int]:
    first = ".".join(name.split(".")[:2])
    main = next((place for place, rooms in enumerate(LAYERS) if first in rooms), -1)
    return main, PROBLEMS.index(name) if name in PROBLEMS else len(PROBLEMS)


def direction() -> Iterator[Violation]:
    """Yield imports that point upwards or sideways, and rooms without a layer."""
    for edge in imports():
        importer, imported = room(edge.importer), room(edge.imported)
        if edge.imported == "balance" and edge.importer.startswith("balance."):
            yield _import(edge, "imports the package itself; import the module instead")
        elif -1 in (layer(importer)[0], layer(imported)[0]):
            continue
        elif imported in FORBIDDEN.get(importer, ()) or (importer != imported and layer(imported) >= layer(importer)):
            yield _import(edge, f"{importer} must not import {imported}, which is no lower layer")
    for module, path in modules().items():
        if layer(room(module))[0] < 0 and module != "experiments":
            yield Violation("direction", relative(path), 1, f"{room(module)} has no place in LAYERS", room(module))


def _import(edge: Import, text: str) -> Violation:
    return Violation("direction", relative(modules()[edge.importer]), edge.line, f"{edge}: {text}", str(edge))


def circles() -> Iterator[Violation]:
    """Yield every circle of files and of rooms, once the imports in TO_DO are taken out."""
    postponed = TO_DO.get("direction", set()) | TO_DO.get("circles", set())
    left = [edge for edge in imports() if str(edge) not in postponed]
    for name in (str, room):
        graph: dict[str, set[str]] = {}
        for edge in left:
            if name(edge.importer) != name(edge.imported):
                graph.setdefault(name(edge.importer), set()).add(name(edge.imported))
        for start in sorted(graph):
            if (circle := _way(graph, start)) and min(circle) == start:
                first = next(edge for edge in left if (name(edge.importer), name(edge.imported)) == (circle[0], circle[1]))
                where = relative(modules()[first.importer])
                yield Violation("circles", where, first.line, " -> ".join(circle), str(first))


def _way(graph: dict[str, set[str]], start: str) -> list[str] | None:
    """Return a shortest way from a node back to it."""
    ways, seen = [[start]], set()
    for way in ways:
        for following in sorted(graph.get(way[-1], ())):
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


# Functions, files, docstrings


def body_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """Return the statements of a function without its docstring; none for a stub."""
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[documented:]
    stub = all(isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in body)
    return [] if stub else body


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = body_of(function)
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def nesting(nodes: Iterable[ast.AST]) -> int:
    """Return the depth of if, for, while, with, try and match; an elif is no deeper than its if."""
    return max((_depth(node) for node in nodes), default=0)


def _depth(node: ast.AST) -> int:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
        return 0
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
    if not isinstance(node, blocks):
        return nesting(ast.iter_child_nodes(node))
    following = getattr(node, "orelse", [])
    chained = following if isinstance(node, ast.If) and len(following) == 1 and isinstance(following[0], ast.If) else []
    inner = [child for child in ast.iter_child_nodes(node) if child not in chained]
    return max(1 + nesting(inner), nesting(chained))


def sizes() -> Iterator[Violation]:
    for path in files(MEASURED):
        for function in functions(path):
            if (lines := length(function)) > LINES:
                yield _at("function", path, function, f"{function.name} has {lines} lines, {lines - LINES} too many")
            if (depth := nesting(body_of(function))) > NESTING:
                yield _at("nesting", path, function, f"{function.name} nests {depth} deep, {depth - NESTING} too deep")
    for path in files(FOLDERS):
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE:
            yield Violation("file", relative(path), lines, f"{lines} lines, {lines - FILE} too many", relative(path))


def medians() -> Iterator[Violation]:
    if (median := statistics.median(bodies())) > MEDIAN:
        text = f"the median function has {median:g} lines, but should have at most {MEDIAN}"
        yield Violation("median", " ".join(MEASURED), 1, text, "all")


def bodies(folders: Iterable[str] = MEASURED) -> list[int]:
    return [lines for path in files(folders) for function in functions(path) if (lines := length(function))]


def questions() -> Iterator[Violation]:
    """Yield docstrings that begin with a question word."""
    for path in files(MEASURED):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                begin = (ast.get_docstring(node) or "").strip().split("\n")[0]
                if QUESTION.match(begin):
                    yield _at("docstring", path, node.body[0], f"begins with a question word: {begin}")


def is_rule(name: str) -> bool:
    words = name.strip("_").split("_")
    return words[-1] in {"rule", "rules", "balancer", "balancers"} or words in (["loss"], ["gradient"])


def untyped_rules() -> Iterator[Violation]:
    """Yield variables, attributes, parameters and results that hold a rule and are annotated with ``Any``."""
    for path in _within(TYPED_RULES):
        for node in ast.walk(tree(path)):
            name, annotation = _annotated(node)
            if annotation is not None and is_rule(name) and re.search(r"\bAny\b", ast.unparse(annotation)):
                yield _at("any", path, node, f"{name}: {ast.unparse(annotation)}")


def _annotated(node: ast.AST) -> tuple[str, ast.expr | None]:
    if isinstance(node, ast.arg):
        return node.arg, node.annotation
    if isinstance(node, ast.AnnAssign):
        return _last_name(node.target), node.annotation
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name, node.returns
    return "", None


def asked_rules() -> Iterator[Violation]:
    """Yield ``hasattr``, ``getattr`` and ``takes`` of a rule."""
    for path in _within(WITHOUT_QUESTIONS):
        for node in ast.walk(tree(path)):
            if (
                isinstance(node, ast.Call)
                and node.args
                and _last_name(node.func) in {"hasattr", "getattr", "takes"}
                and is_rule(_last_name(node.args[0]))
            ):
                yield _at("question", path, node, ast.unparse(node))


def _last_name(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _within(prefixes: tuple[str, ...]) -> list[Path]:
    return [path for path in files(["balance"]) if relative(path).startswith(prefixes)]


def _at(check: str, path: Path, node: ast.AST, text: str) -> Violation:
    return Violation(check, relative(path), node.lineno, text, relative(path))


CHECKS = (direction, absolute_imports, circles, sizes, medians, questions, untyped_rules, asked_rules)
NAMES = ("direction", "circles", "function", "nesting", "file", "median", "docstring", "any", "question")


@cache
def violations() -> tuple[Violation, ...]:
    return tuple(violation for check in CHECKS for violation in check())


def is_listed(violation: Violation) -> bool:
    """Return whether TO_DO lists a violation, by its entry or by a folder above it."""
    listed = TO_DO.get(violation.check, ())
    return violation.entry in listed or any(entry.endswith("/") and violation.path.startswith(entry) for entry in listed)


def summary() -> str:
    """Return a table: by room, the violations of every check, listed in TO_DO or not, and the median body."""
    rows = {name: dict.fromkeys(NAMES, 0) for name in dict.fromkeys(_room_of(relative(path)) for path in files(FOLDERS))}
    for violation in violations():
        if violation.check != "median":
            rows[_room_of(violation.path)][violation.check] += 1
    columns = [name for name in NAMES if name != "median"]
    lines = [f"{'':34}" + "".join(f"{column:>10}" for column in columns)]
    lines += [f"{name:34}" + "".join(f"{row[column] or '-':>10}" for column in columns) for name, row in sorted(rows.items())]
    lines += [f"{'all':34}" + "".join(f"{sum(row[column] for row in rows.values()):>10}" for column in columns)]
    return "\n".join([*lines, f"median lines of {len(bodies())} functions: {statistics.median(bodies()):g}"])


def _room_of(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[: 3 if parts[:2] == ("experiments", "problems") else 2][: len(parts) - 1] or parts[:1])


def main(paths: list[str]) -> int:
    prefixes = tuple(relative(Path(path).resolve()).removeprefix(".") for path in paths)
    if prefixes:
        shown = [violation for violation in violations() if violation.path.startswith(prefixes)]
    else:
        shown = [violation for violation in violations() if not is_listed(violation)]
    print(*shown, sep="\n", end="\n\n" if shown else "")
    print(summary())
    return int(bool(shown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
