"""Check the prose of docstrings, comments, messages and Markdown files for plain English.

python tests/plain_english.py                    every violation outside TO_DO, and a summary of all
python tests/plain_english.py balance/stage ...  every violation in these files and folders, TO_DO or not
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("balance", "experiments", "benchmarks", "tests")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if path.parent.parent.name != "methods"  # generated
)
PROJECT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
MARKDOWN = (*PROJECT, "experiments/README.md", "benchmarks/README.md", *PAGES)
EXEMPT = ("tests/plain_english.py", "tests/test_plain_english.py")  # they quote the words
WORDS, SEMICOLONS = 25, 1

BE = r"\b(?:is|are|was|were|be|been)"
END = r"(?=\s*(?:[.,;:)!?]|$))"
AVOID = {  # pattern -> remedy
    r"\bbeside\b": "next to, relative to, in addition to",
    rf"\bto be had\b|{BE} had\b": "available",
    r"\bof (?:its|their) own\b": "separate",
    r"\bha(?:s|ve|d|ving) (?:nothing |something )?to do with\b": "name the relation",
    r"\bfor the eyes of\b": "name the purpose",
    r"\bdear(?:er|est)?\b": "expensive",
    r"\bcomes? by\b": "runs, arrives",
    r"\bgo(?:es)? on\b": "continues",
    r"\bby (?:itself|themselves)\b": "separately, automatically",
    rf"{BE}(?: not| no longer| already| still)? there\b(?! (?:a|an|any|no|to)\b)": "exists",
    r"\balone\b": "only",
    r"\bholds (?:the|a|an|its|all|no|what|one|every|them|it)\b|\bheld (?:in|by|for)\b": "keeps, stores",
    r"\b(?:that|those) of\b": "repeat the noun",
    r"\b(?:do|does|did) the same\b": "name it",
    rf"(?<!is )(?<!are )(?<!be )(?<!was )(?<!were )(?<!stays )(?<!stay )(?<!remains )\bthe same{END}": "repeat the noun",
    r"\bwhat (?:is|are|was|were)\b(?![^.;:]*\?)": "use a noun",
    r"(?<!user )(?<!who )(?<!reader )(?<!author )\b(?:knows|thinks|wants|speaks|complains)\b": "code does none of these",
    rf"{BE} (?:told|wanted)\b(?! apart)|\btells\b(?! apart)": "given, required, returns",
    r"\bstands\b(?! for)": "is",
}
START = re.compile(r"(What|How|Where|Which|Whether|Who|That|Those)\b")
CLAUSE = re.compile(r"(?:What|Whichever|Whoever)\b[^?]*$")
SECTION = re.compile(
    r"(Args|Returns|Raises|Yields|Attributes|Source|Sources|Note|Notes|Example|Examples|Warns|References|Warning):$"
)
ITEM = re.compile(r"(?:[*-]|\d+[.)]) +|\|")
ENTRY = re.compile(r"[*`\w., \[\]()|]{1,60}?(?<!\.): +")
ABBREVIATED = re.compile(r"\b(e\.g|i\.e|et al|eqs?|cf|vs|secs?|figs?|no|approx|resp|app|alg)\.", re.IGNORECASE)

# Files and folders ("…/") that are not yet clean, to be emptied.
# fmt: off
TO_DO: set[str] = set()
# fmt: on


class Violation(NamedTuple):
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Prose(NamedTuple):
    """A paragraph, list item or entry of one kind: docstring, comment, message or markdown."""

    kind: str
    line: int
    text: str
    start: bool = False  # of a docstring
    citation: bool = False  # sentences are not measured


# Reading


def of_python(path: Path) -> Iterator[Prose]:
    source = path.read_text(encoding="utf-8")
    documented: set[int] = set()
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                documented.add(id(node.body[0].value))
                yield from of_docstring(text, node.body[0].lineno)
    if path.relative_to(ROOT).parts[0] != "tests":
        yield from of_comments(source)
        yield from of_messages(parsed, documented)


def of_docstring(text: str, line: int) -> Iterator[Prose]:
    """Yield the paragraphs, list items and entries of a docstring; leave indented blocks and doctests out."""
    first, _, rest = text.partition("\n")
    indents = [len(row) - len(row.lstrip()) for row in rest.split("\n") if row.strip()]
    margin = min(indents, default=0)
    rows = [first.strip(), *(row[margin:].rstrip() for row in rest.split("\n"))]
    section, started = "", False
    for place, block in _blocks(rows):
        if SECTION.match(block[0]):
            section = block[0]
        elif not block[0].startswith(" "):
            section = ""
        skipped = int(block[0] == section)
        body = block[skipped:]
        literal = not section and block[0].startswith((" ", ".. "))
        if not body or literal or section.startswith("Example"):
            continue
        cited = section.startswith(("Source", "Ref"))
        for offset, words in _items(body, entries=section in {"Args:", "Raises:", "Attributes:", "Warns:"}):
            yield Prose("docstring", line + place + skipped + offset, words, start=not started, citation=cited)
            started = True


def _blocks(rows: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield runs of lines that are not empty, with the place of the first."""
    block: list[str] = []
    for place, row in enumerate([*rows, ""]):
        if row.strip():
            block.append(row)
        elif block:
            yield place - len(block), block
            block = []


def _items(block: list[str], *, entries: bool) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of a block: a new one begins at a list item, an entry, or where indented diagrams end."""
    margin = len(block[0]) - len(block[0].lstrip())
    begin, text = 0, ""
    for place, row in enumerate(block):
        content, indent = row.strip(), len(row) - len(row.lstrip())
        diagram = content.startswith((">>>", "->", "─")) or len(re.findall("->|─>", content)) > 1
        deeper = indent >= margin + 4 and not entries and place > 0 and not ITEM.match(block[0].strip())
        new = diagram or deeper or ITEM.match(content) or (entries and indent == margin)
        if new and text:
            yield begin, text
            text = ""
        if diagram or deeper:
            continue
        if not text:
            begin, content = place, ITEM.sub("", content, count=1) if ITEM.match(content) else content
            content = ENTRY.sub("", content, count=1) if entries else content
        text = f"{text} {content}".strip()
    if text:
        yield begin, text


def of_comments(source: str) -> Iterator[Prose]:
    """Yield comments; lines that follow each other are one."""
    last, begin, text = (-1, -1), 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(!|noqa|type:|pragma|ruff|fmt)", token.string):
            continue
        content = re.sub(r"#\s*(noqa|type:|fmt:).*", "", token.string[1:]).strip()
        if not content:
            continue
        alone = not token.line[: token.start[1]].strip()
        if not (alone and (token.start[0] - 1, token.start[1]) == last):
            if text:
                yield Prose("comment", begin, text)
            begin, text = token.start[0], ""
        text = f"{text} {content}".strip()
        last = token.start if alone else (-1, -1)
    if text:
        yield Prose("comment", begin, text)


def of_messages(parsed: ast.Module, documented: set[int]) -> Iterator[Prose]:
    """Yield strings of four words or more; what an f-string inserts counts as one."""
    parts = {
        id(part) for node in ast.walk(parsed) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node
    }
    for node in ast.walk(parsed):
        if id(node) in documented or id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "CODE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) > 3 and "\n\n" not in text:
            yield Prose("message", node.lineno, " ".join(text.split()))


def of_markdown(path: Path) -> Iterator[Prose]:
    """Yield paragraphs, list items and cells of tables; leave code blocks out."""
    fenced, rows = False, []
    for row in path.read_text(encoding="utf-8").split("\n"):
        fenced ^= row.lstrip().startswith("```")
        rows.append("" if fenced or row.startswith(("```", "    ", "<", "#")) or row.lstrip().startswith("```") else row)
    for place, block in _blocks(rows):
        for offset, text in _items(block, entries=False):
            for cell in text.split(" | ") if block[0].startswith("|") else [text]:
                yield Prose("markdown", place + offset + 1, cell.strip("| "))


# Judging


def plain(text: str) -> str:
    """Return a text with one word for each code span, formula, link, shape and quotation."""
    text = re.sub(r"(?::\w+:)?``?[^`]+``?`?_*", "CODE", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"\$[^$]+\$|https?://\S+", "CODE", text)
    shape = r"\((?:[\w…*+]{1,3})?(?:, ?[\w…*+]{1,3})*,?\)"
    text = re.sub(rf"{shape}(?: -> {shape})?", "CODE", text)
    text = re.sub(r"\b([Ll]eav\w+|left|[Ll]et) ((?:[\w']+ ){0,4})alone\b", r"\1 \2", text)
    return ABBREVIATED.sub(r"\1", text).replace("...", "…")


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.?!])[\"')*]*\s+(?=[\"'(*]*[A-Z0-9\[])", text) if part.strip()]


def judge(prose: Prose) -> Iterator[str]:
    """Yield what should be changed in a paragraph."""
    text = plain(prose.text)
    if prose.start and (begin := START.match(text)):
        yield f"docstring begins with {begin[0]!r}"
    for pattern, remedy in AVOID.items():
        for match in re.finditer(pattern, text):
            yield f"{match[0].strip()!r} -> {remedy}: …{text[max(0, match.start() - 30) : match.end() + 30]}…"
    if re.search(r"(?<!CODE) (?:->|→) ", text) and prose.kind != "message":
        yield f"an arrow is no sentence: {text[:80]}"
    if not prose.citation:
        yield from _long(prose, text)


def _long(prose: Prose, text: str) -> Iterator[str]:
    for number, sentence in enumerate(sentences(text)):
        if not (prose.start and number == 0) and CLAUSE.match(sentence):
            yield f"sentence begins with a noun clause: {sentence[:60]}"
        words = sum(bool(re.search(r"\w", word)) for word in sentence.split())
        if prose.kind != "message" and words > WORDS:
            yield f"sentence of {words} words: {sentence[:60]}…"
        if prose.kind != "message" and sentence.count(";") > SEMICOLONS:
            yield f"sentence with {sentence.count(';')} semicolons: {sentence[:60]}…"


def files() -> list[Path]:
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in (*sources, *(ROOT / name for name in MARKDOWN)) if relative(path) not in EXEMPT]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def check(path: Path) -> list[Violation]:
    prose = of_markdown(path) if path.suffix == ".md" else of_python(path)
    found = [Violation(relative(path), part.line, text) for part in prose for text in judge(part)]
    return sorted(found, key=lambda violation: violation.line)


@cache
def violations() -> tuple[Violation, ...]:
    return tuple(violation for path in files() for violation in check(path))


def is_listed(path: str) -> bool:
    return any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in TO_DO)


def summary(found: Iterable[Violation]) -> str:
    counts: dict[str, int] = {}
    for violation in found:
        parts = violation.path.split("/")
        name = "/".join(parts[: 3 if parts[:2] == ["experiments", "problems"] else 2][: max(1, len(parts) - 1)])
        counts[name] = counts.get(name, 0) + 1
    return "\n".join(
        [f"{name:34}{count:>6}" for name, count in sorted(counts.items())] + [f"{'all':34}{sum(counts.values()):>6}"]
    )


def main(paths: list[str]) -> int:
    prefixes = tuple(relative(Path(path).resolve()).removeprefix(".") for path in paths)
    if prefixes:
        shown = [violation for violation in violations() if violation.path.startswith(prefixes)]
    else:
        shown = [violation for violation in violations() if not is_listed(violation.path)]
    print(*shown, sep="\n", end="\n\n" if shown else "")
    print(summary(shown if prefixes else violations()))
    return int(bool(shown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
