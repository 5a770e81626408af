import math

import numpy as np
import pytest

from balance.comparison.figures import gallery, training
from balance.comparison.figures.delta_m import delta_m
from balance.comparison.figures.scatter import pareto
from tests.comparison.figures.reading import assert_no_overlap
from tests.comparison.synthetic import TASKS, comparison, curves, estimate, realistic, row, two_rows

NAN = math.nan
FIGURES = ["delta_m", "pareto", "cost", "curves", "conflicts", "validation"]
ODD = ("$a$_<&%", "_b")


def test_figures_without_content_are_none():
    bare = comparison(row(metrics={"a/b": estimate(NAN)}, delta_m=estimate(NAN), time=NAN), baselines=None)
    assert gallery.every_figure(bare) == {}
    assert pareto(bare, "a/b", "a/b") is None
    assert training.conflicts(bare, {"ls": {"conflicts": (np.arange(3.0), np.zeros(3))}}) is None  # one task has no pairs


@pytest.mark.parametrize(
    ("made", "tasks", "names"),
    [
        (realistic, TASKS, FIGURES),
        (lambda: realistic(pairs=[("ls", None)], seeds=1, baselines=False), TASKS, ["pareto", "cost", "curves", "validation"]),
        (lambda: realistic(pairs=[("a_$<&%", "_$b$")], tasks=ODD), ODD, FIGURES),
    ],
)
def test_every_figure_is_readable(made, tasks, names):
    of = made()
    drawn = gallery.every_figure(of, curves(of, tasks))
    assert list(drawn) == names
    assert set(names) <= set(gallery.CAPTIONS)
    for figure in drawn.values():
        assert_no_overlap(figure)


def test_figures_are_saved_for_a_paper(tmp_path):
    drawn = {"delta_m": delta_m(two_rows())}
    files = gallery.save(drawn, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["delta_m.pdf", "delta_m.png"]
    assert files[0].read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in files[0].read_bytes()
    assert files[1].read_bytes().startswith(b"\x89PNG")
    first = files[0].read_bytes()
    assert gallery.save(drawn, tmp_path / "new" / "folder")[0].read_bytes() == first
