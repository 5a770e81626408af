"""Notebooks of the documentation: they run, and are stored with outputs that show nothing of the machine."""

import base64
import re

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat

from tests import notebooks, plain_english

SLOW = ("digits_from_sweep_to_report",)
MACHINE = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|Users|var|usr|opt|private)/")
LARGEST = 100_000  # bytes of a picture

each = pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(output):
    """The text of an output in all its forms."""
    return [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if kind != "image/png")]


def pictures(notebook):
    return [base64.b64decode(o.data["image/png"]) for o in outputs(notebook) if "image/png" in o.get("data", {})]


def check_outputs(notebook):
    """Outputs have no error, warning or path of a machine."""
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        for text in texts(output):
            assert not MACHINE.search(text), text
            assert "Warning" not in text, text
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert pictures(notebook)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in notebooks.NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path, tmp_path):
    check_outputs(notebooks.execute(path, tmp_path))


@each
def test_stored_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    check_outputs(notebook)
    assert max(map(len, pictures(notebook))) < LARGEST
    assert notebook.metadata == notebooks.METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)


@each
def test_text_is_plain_english(path, tmp_path):
    cells = nbformat.read(path, as_version=4).cells
    page = tmp_path / "page.md"
    page.write_text("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), encoding="utf-8")
    found = [text for prose in plain_english.of_markdown(page) for text in plain_english.judge(prose)]
    assert not found, "\n".join(found)


def test_paths_of_a_machine_are_found():
    assert MACHINE.search("Report: /home/me/runs")
    assert not MACHINE.search("runs/digits/tmp/x and https://example.org/tmp/x")
