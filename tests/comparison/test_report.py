import base64
import re
from datetime import datetime

import pytest
from matplotlib.figure import Figure

from balance.comparison.figures import gallery
from balance.comparison.figures.delta_m import delta_m
from balance.comparison.report import answer, html
from balance.comparison.tables import cells, legend
from tests.comparison.pages import Page, plain, report
from tests.comparison.synthetic import comparison, curves, estimate, realistic, row, two_rows

NAN = float("nan")


@pytest.fixture(scope="module")
def long():
    """The report of a full comparison."""
    of = realistic()
    return of, *report(of, gallery.every_figure(of, curves(of)), command="python compare.py --html")


def test_nothing_is_loaded_from_elsewhere(long):
    _, text, page = long
    assert "http" not in re.sub(r"data:image/[^\"]*", "", text)
    assert "//" not in re.sub(r"data:image/[^\"]*", "", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset", "data")]
    assert len(links) == len(gallery.CAPTIONS)
    assert all(link.startswith("data:image/") for link in links)


def test_figures_are_inside_with_captions(long):
    _, text, page = long
    assert len(text) < 1_500_000
    assert [attrs["id"] for tag, attrs in page.tags if tag == "figure"] == list(gallery.CAPTIONS)
    for k, (image, caption) in enumerate(zip(page.images, gallery.CAPTIONS.values(), strict=True), start=1):
        kind, _, content = image["src"].partition(";base64,")
        decoded = base64.b64decode(content, validate=True)
        assert kind == "data:image/svg+xml"
        assert b"<svg" in decoded[:1000]
        assert caption.startswith(image["alt"])
        assert f"Figure {k}. {caption}" in page


def test_without_baselines_the_answer_is_the_result_of_all_tasks():
    def of(*rows, higher):
        made = [
            row(label, metrics={"all/success": estimate(*values, verdict=verdict)}, mean_rank=2.0)
            for label, values, verdict in rows
        ]
        return answer(comparison(*made, higher={"all/success"} if higher else (), baselines=None))

    told = of(("ls", (0.75, 0.25), "best"), ("uw", (0.5, 0.25), "alike"), ("famo", (0.25, 0.0), "worse"), higher=True)
    assert told.startswith("ls is best: all/success 0.50 (95 % interval -2.68 to 3.68).")
    assert "Not distinguishable from it: uw. Worse: famo." in told
    alone = of(("ls", (1.0,), "best"), higher=False)
    assert alone == "ls is the only method with a result: all/success 1.00 (one seed, so no interval)."
    assert of(("ls", (NAN,), "unclear"), higher=True) == "No method has a finite all/success."


def test_a_large_figure_becomes_png(monkeypatch):
    monkeypatch.setattr("balance.comparison.report.LARGEST_SVG", 10_000)
    figure = Figure(figsize=(1, 1))
    axes = figure.add_subplot()
    for k in range(300):
        axes.plot([k % 7, 1], [k, k + 1])
    _, page = report(two_rows(), {"pareto_2": figure, "other": Figure()})
    assert page.images[0]["src"].startswith("data:image/png;base64,iVBOR")
    assert page.images[0]["alt"] == "Gain on one metric against loss on another: means over seeds with their standard errors"
    assert page.images[1]["src"].startswith("data:image/svg+xml")
    assert page.images[1]["alt"] == "other"


def test_table_is_that_of_the_other_formats(long):
    of, _, page = long
    header, lines = cells(of)
    head, *body = page.rows[: len(lines) + 1]
    assert [plain(text) for _, text in head] == header
    for number, (found, line) in enumerate(zip(body, lines, strict=True), start=1):
        shown = [cell.text + cell.mark for cell in line]
        shown[0] = f"{number if number <= 13 else ''}{shown[0]}"
        assert [plain(text) for _, text in found] == shown
        assert [kind for kind, _ in found[1:]] == [cell.verdict for cell in line[1:]]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"][len(lines)] == "single-task"
    assert legend(of) in page


def test_text_around_the_table(long):
    of, text, page = long
    assert text.startswith("<!DOCTYPE html>")
    assert plain(page.text).startswith("A title")
    assert answer(of) in plain(page.text)
    for words in ("Student's t", "paired bootstrap", "fewer than 6 common seeds", "2 of 2n cases", "mean rank is among"):
        assert words in page
    assert "python compare.py --html" in page
    runs = [[text for _, text in found] for found in page.rows if len(found) == 3][1:]
    assert runs == [[line.label, str(run.seed), run.run_id] for line in of.rows for run in line.runs]


def test_notes_time_and_what_is_left_out():
    _, page = report(two_rows(), created=datetime(2024, 5, 17, 9, 5))
    assert "A note." in page
    assert "2024-05-17 09:05" in page
    assert "Figures" not in page
    assert "Make it again" not in page
    _, page = report(realistic(pairs=[("ls", None)], seeds=1, baselines=False))
    assert "What to know" not in page
    assert "delta_m is" not in page


def test_everything_is_escaped():
    rough = "<b>&amp;'\"<script>alert(1)</script>"
    of = comparison(row(rough, metrics={f"{rough}/x": estimate(1.0, 2.0, 3.0)}), notes=(rough,), baselines_from=rough)
    text = html(of, {rough: Figure()}, title=rough, command=rough)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert(1)") > 6
    assert rough in page


def test_the_same_comparison_makes_the_same_page():
    of, when = two_rows(), datetime(2024, 5, 17)
    pages = [html(of, {"delta_m": delta_m(of)}, title="A", created=when) for _ in range(2)]
    assert pages[0] == pages[1]


def of_verdicts(*drops, seeds=3):
    rows = [row(f"m{k}", seeds=seeds, delta_m=drop) for k, drop in enumerate(drops)]
    return comparison(*rows, metrics=("a/b",))


BEST = estimate(3.0, 4.0, 5.0, verdict="best")


@pytest.mark.parametrize(
    ("drops", "expected"),
    [
        ((BEST,), ["m0 is the only method with a result: delta_m 4.0 % (95 % interval 1.5 to 6.5)", "average worse than"]),
        ((BEST, estimate(4.0, 5.0, verdict="alike")), ["m0 is best: delta_m 4.0 %", "Not distinguishable from it: m1."]),
        (
            (BEST, estimate(5.0, verdict="alike"), estimate(9.0), estimate(9.0)),
            ["Not distinguishable from it: m1. 3 seeds are too few to call the others worse."],
        ),
        ((BEST, estimate(9.0)), ["3 seeds are too few to call m1 worse."]),
        (
            (BEST, estimate(9.0, verdict="worse"), estimate(9.0), estimate(8.0)),
            ["Worse: m1. 3 seeds are too few to call m2, m3 worse."],
        ),
        ((BEST, estimate(4.0, verdict="best")), ["Equally good: m1."]),
        ((estimate(NAN, verdict="worse"), BEST), ["m1 is the only method with a result", "Not finite: m0."]),
        ((estimate(NAN),), ["No method has a finite delta_m."]),
        ((estimate(-3.0, -4.0, -5.0, verdict="best"),), ["delta_m -4.0 %", "average better than"]),
        ((estimate(-1.0, 2.0, verdict="best"),), ["which may be chance"]),
    ],
)
def test_answer(drops, expected):
    text = answer(of_verdicts(*drops))
    for words in expected:
        assert words in text
    assert "  " not in text


def test_answer_of_one_seed():
    text = answer(of_verdicts(estimate(4.0, verdict="best"), estimate(5.0), seeds=1))
    assert "delta_m 4.00 % (one seed, so no interval)" in text
    assert "1 seed is too few to call m1 worse." in text


def test_answer_without_baselines():
    assert answer(realistic(baselines=False)).startswith("scaleinvls + mgda has the best mean rank: 1.00 among 13 methods.")
