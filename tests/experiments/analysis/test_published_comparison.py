"""Published tables next to runs: their lines, legends and notes."""

import io
import json

import pytest
from rich.console import Console

from balance.comparison.formats import MISSING, latex, markdown, terminal
from balance.comparison.recorded_run import RecordedRun
from balance.comparison.run_table import tabulate
from balance.comparison.tables import SINGLE_TASK
from experiments.analysis import published_tables
from experiments.analysis.published_comparison import (
    LOCAL_PREFIX,
    compare_with_published,
    legend,
    notes,
    table_for_latex,
    text_table,
)
from experiments.analysis.published_export import as_csv, as_json
from tests.experiments.analysis.published_runs import NYUV2, REAL, SCENES, STL, compared_runs

TABLES = [pytest.param(published_tables.load(name), id=name) for name in published_tables.names()]


def lines_by_label(table):
    return {line[0].text: dict(zip(table.header, (cell.text for cell in line), strict=True)) for line in table.lines}


def test_a_table_without_runs():
    published = compare_with_published(NYUV2, None)
    table = text_table(published)
    assert (published.relation, published.comparable, published.title) == (
        "",
        None,
        "Published results on NYUv2 (not measured here)",
    )
    assert table.header[:3] == ["method", "source", "delta_m % ↓"]
    assert table.header[3:6] == [f"mean rank ↓ {source}" for source in ("FAMO", "GO4Align", "Nash-MTL")]
    assert table.header[6:] == [f"{name} {'↑' if name in NYUV2.higher_is_better else '↓'}" for name in STL]
    lines = lines_by_label(table)
    assert list(lines) == [*NYUV2.methods, SINGLE_TASK]
    assert table.methods == 21
    assert lines["FAMO"]["segmentation/miou ↑"] == "0.3888 ± 0.0054"
    assert lines["FAMO"]["delta_m % ↓"] == "-4.10 ± 0.39"
    assert lines["CAGrad"]["delta_m % ↓"] == "0.20"
    assert lines["STCH"]["depth/abs_error ↓"] == lines["STCH"]["mean rank ↓ FAMO"] == MISSING
    assert (lines[SINGLE_TASK]["source"], lines[SINGLE_TASK]["normals/mean_angle ↓"]) == ("codes", "25.01")


def test_numbers_that_disagree_are_recomputed_in_parentheses():
    lines = lines_by_label(text_table(compare_with_published(NYUV2, None)))
    assert lines["IMTL-G"]["delta_m % ↓"] == "-0.76 (-0.60)"
    assert lines["SI"]["mean rank ↓ Nash-MTL"] == "7.11 (7.00)"
    inside = [text for line in lines.values() for text in line.values() if "(" in text]
    assert len(inside) == 1 + 5
    remarks = notes(compare_with_published(NYUV2, None))
    assert any(
        note.startswith("IMTL-G: the printed delta_m does not follow from the printed metrics; one of the two has")
        for note in remarks
    )
    assert any("the ranks of SI, RLW, UW, PCGrad, GradDrop do not follow from the printed metrics" in note for note in remarks)
    assert "In parentheses: recomputed" in legend(compare_with_published(NYUV2, None))
    assert "In parentheses" not in legend(compare_with_published(published_tables.load("celeba"), None))


def test_notes_of_other_tables():
    of_cityscapes = notes(compare_with_published(published_tables.load("cityscapes"), None))
    assert "Mean ranks of GO4Align: LS was ranked with the numbers of SI." in of_cityscapes
    assert any(note.startswith("LS: FAMO's and GO4Align's tables have SI's numbers") for note in of_cityscapes)
    of_celeba = notes(compare_with_published(published_tables.load("celeba"), None))
    assert "Mean ranks of GO4Align begin at 0, not at 1." in of_celeba
    assert any(note.startswith(f"{SINGLE_TASK}: the baseline of every published delta_m") for note in of_celeba)


@pytest.mark.parametrize("table", TABLES)
def test_notes_explain_every_source(table):
    published = compare_with_published(table, None)
    keys = {line["source"] for line in lines_by_label(text_table(published)).values()}
    assert all(any(note.startswith(f"{key}: ") for note in notes(published)) for key in keys)
    assert table.conditions in legend(published)


def test_metrics_of_few_methods_are_left_out():
    table = text_table(compare_with_published(published_tables.load("celeba"), None))
    assert table.header == ["method", "source", "delta_m % ↓", "mean rank ↓ FAMO", "mean rank ↓ GO4Align"]
    assert "Metrics are printed for FairGrad and single-task networks only" in table.legend
    assert text_table(compare_with_published(published_tables.load("metaworld"), None)).header == [
        "method",
        "source",
        "all/success ↑",
    ]


def test_runs_on_the_same_data_appear_below_their_method():
    published = compare_with_published(NYUV2, compared_runs())
    assert published.comparable
    assert published.relation == (
        "The runs here are on NYUv2 too, but with data.protocol=sound (papers: paper), train.epochs=12 (papers: 200)."
    )
    assert published.title == "Published results on NYUv2 (not measured here, except for lines with 'here:')"
    table = text_table(published)
    order = list(lines_by_label(table))
    assert order[order.index("PCGrad") + 1] == "here: ls + pcgrad"
    assert order[order.index("FAMO") + 1] == "here: famo"
    assert order[-3:] == ["here: famo + pcgrad", SINGLE_TASK, f"here: {SINGLE_TASK}"]
    assert table.methods == 21 + 3
    line = lines_by_label(table)["here: famo"]
    assert (line["source"], line["mean rank ↓ FAMO"]) == ("2 seeds", MISSING)
    # by hand: errors 10 % up in 4 metrics, shares 1 / 11 down in 5, in one of two seeds
    second = (4 * 10 + 5 * 100 / 11) / 9
    assert line["delta_m % ↓"] == f"{second / 2:.2f} ± {second / 2:.2f}"
    mean, half = STL["depth/abs_error"] * 1.05, STL["depth/abs_error"] * 0.05
    assert line["depth/abs_error ↓"] == f"{mean:.4f} ± {half:.4f}"
    assert lines_by_label(table)[f"here: {SINGLE_TASK}"]["depth/abs_error ↓"] == "0.6754"
    assert {cell.verdict for cells in table.lines for cell in cells} == {None}
    assert "their delta_m is against the single-task networks of the papers" in table.legend


def test_runs_with_the_settings_of_the_papers():
    published = compare_with_published(NYUV2, compared_runs(settings={"data.source": "files"} | NYUV2.as_published))
    assert published.relation.endswith("and no known setting differs from the papers.")


def test_relation_lists_all_different_settings_of_the_runs():
    runs = [
        RecordedRun(f"{epochs}", "ls", None, 0, {"data.source": "files", "train.epochs": epochs}, dict(STL))
        for epochs in ("5", "200", "10")
    ]
    compared = tabulate(runs, experiment="nyuv2", higher_is_better=NYUV2.higher_is_better, baselines=None)
    published = compare_with_published(NYUV2, compared)
    assert published.relation == "The runs here are on NYUv2 too, but with train.epochs=10 or 5 (papers: 200)."
    labels = list(lines_by_label(text_table(published)))
    assert [label for label in labels if label.startswith("here")] == [f"here: ls train.epochs={n}" for n in ("10", "200", "5")]
    assert f"here: {SINGLE_TASK}" not in labels


def test_metrics_that_the_runs_lack_are_missing():
    runs = [RecordedRun("a", "famo", None, 0, REAL, {"depth/abs_error": 0.5})]
    compared = tabulate(runs, experiment="nyuv2", higher_is_better=NYUV2.higher_is_better, baselines=None)
    line = lines_by_label(text_table(compare_with_published(NYUV2, compared)))["here: famo"]
    assert (line["depth/abs_error ↓"], line["depth/rel_error ↓"], line["delta_m % ↓"]) == ("0.5000", MISSING, "nan")
    assert line["source"] == "1 seed"


@pytest.mark.parametrize("settings", [SCENES, {"train.epochs": "12"}])
def test_runs_on_other_data_are_left_out(settings):
    published = compare_with_published(NYUV2, compared_runs(settings=settings))
    assert published.comparable is False
    assert published.relation.startswith("Not comparable with the runs here, which have other data (data.source=")
    assert lines_by_label(text_table(published)) == lines_by_label(text_table(compare_with_published(NYUV2, None)))
    assert LOCAL_PREFIX.strip() not in text_table(published).legend
    assert "Not comparable" in table_for_latex(published).legend


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("recorded", [False, True])
def test_every_table_in_every_form(table, recorded):
    real = {"nyuv2": REAL, "cityscapes": REAL, "celeba": {"data.source": "celeba"}, "metaworld": {}}
    settings = real.get(table.experiment, {"data.path": "/data/qm9"})
    compared = compared_runs(table, settings) if recorded else None
    published = compare_with_published(table, compared)
    columns = len(text_table(published).header)
    assert {len(line) for line in text_table(published).lines} == {columns}
    text = markdown(text_table(published))
    assert text.startswith("**Published results on ")
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {columns + 1}
    text = latex(table_for_latex(published))
    assert "not measured here" in text
    assert not set("±↑↓") & set(text)
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(terminal(text_table(published, 6)))
    shown = console.export_text()
    assert all(name in shown for name in table.methods)
    assert "…" not in shown
    assert json.loads(as_json(table.experiment, compared, [published]), parse_constant=pytest.fail)
    assert len(as_csv(compared, [published]).splitlines()) > len(table.methods)


def test_few_metrics_in_a_narrow_terminal():
    table = text_table(compare_with_published(NYUV2, None), 2)
    assert len(table.header) == 6 + 2
    assert table.legend.endswith("7 further metrics are in the other formats.")
