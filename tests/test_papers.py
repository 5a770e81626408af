"""Published tables beside runs: what stands in them, what stays out, and what is said about it."""

import csv
import io
import json

import pytest
from rich.console import Console

from experiments.analysis import published as papers
from experiments.analysis import published_tables as published
from experiments.analysis.comparison import Run, compare
from experiments.analysis.formats import MISSING, latex, markdown, terminal
from experiments.analysis.tables import SINGLE_TASK

SCENES = {"data.source": "scenes", "train.epochs": "12"}
REAL = {"data.source": "files", "data.protocol": "sound", "train.epochs": "12"}
TABLES = [pytest.param(published.load(name), id=name) for name in published.names()]
NYUV2 = published.load("nyuv2")
STL = {name: printed.value for name, printed in NYUV2.in_experiment_units(NYUV2.single_task).items()}


def runs(table=NYUV2, settings=REAL, factors=(1.0, 1.1)):
    """Three pairs of methods whose errors are those of single-task networks times a factor, and whose shares divided by it."""
    alone = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    made = []
    for loss, gradient in (("famo", None), ("ls", "pcgrad"), ("famo", "pcgrad")):
        for seed, factor in enumerate(factors):
            metrics = {name: v / factor if name in table.higher_is_better else v * factor for name, v in alone.items()}
            made.append(Run(f"{loss}{gradient}{seed}", loss, gradient, seed, settings, metrics))
    return compare(
        made, experiment=table.experiment, higher_is_better=table.higher_is_better, baselines=alone, baselines_from="a file"
    )


def lines(sheet):
    return {line[0].text: dict(zip(sheet.header, (cell.text for cell in line), strict=True)) for line in sheet.lines}


def test_a_table_without_runs():
    of = papers.beside(NYUV2, None)
    made = papers.sheet(of)
    assert (of.relation, of.comparable, of.title) == ("", None, "Published results on NYUv2 (not measured here)")
    assert made.header[:3] == ["method", "source", "delta_m % ↓"]
    assert made.header[3:6] == [f"mean rank ↓ {source}" for source in ("FAMO", "GO4Align", "Nash-MTL")]
    assert made.header[6:] == [f"{name} {'↑' if name in NYUV2.higher_is_better else '↓'}" for name in STL]
    found = lines(made)
    assert list(found) == [*NYUV2.methods, SINGLE_TASK]
    assert made.methods == 21
    assert found["FAMO"]["segmentation/miou ↑"] == "0.3888 ± 0.0054"
    assert found["FAMO"]["delta_m % ↓"] == "-4.10 ± 0.39"
    assert found["CAGrad"]["delta_m % ↓"] == "0.20"
    assert found["STCH"]["depth/abs_error ↓"] == found["STCH"]["mean rank ↓ FAMO"] == MISSING
    assert (found[SINGLE_TASK]["source"], found[SINGLE_TASK]["normals/mean_angle ↓"]) == ("codes", "25.01")


def test_what_disagrees_is_recomputed_beside_the_printed_number():
    found = lines(papers.sheet(papers.beside(NYUV2, None)))
    assert found["IMTL-G"]["delta_m % ↓"] == "-0.76 (-0.60)"
    assert found["SI"]["mean rank ↓ Nash-MTL"] == "7.11 (7.00)"
    inside = [text for line in found.values() for text in line.values() if "(" in text]
    assert len(inside) == 1 + 5
    told = papers.notes(papers.beside(NYUV2, None))
    assert any(note.startswith("IMTL-G: delta_m is not that of the printed metrics; one of the two has") for note in told)
    assert any("those of SI, RLW, UW, PCGrad, GradDrop are not those of the printed metrics" in note for note in told)
    assert "In parentheses: recomputed" in papers.legend(papers.beside(NYUV2, None))
    assert "In parentheses" not in papers.legend(papers.beside(published.load("celeba"), None))


def test_notes_of_other_tables():
    of_cityscapes = papers.notes(papers.beside(published.load("cityscapes"), None))
    assert "Mean ranks of GO4Align: LS was ranked with the numbers of SI." in of_cityscapes
    assert any(note.startswith("LS: FAMO's and GO4Align's tables have SI's numbers") for note in of_cityscapes)
    of_celeba = papers.notes(papers.beside(published.load("celeba"), None))
    assert "Mean ranks of GO4Align begin at 0, not at 1." in of_celeba
    assert any(note.startswith(f"{SINGLE_TASK}: the baseline of every published delta_m") for note in of_celeba)


@pytest.mark.parametrize("table", TABLES)
def test_every_source_that_a_line_names_is_spelt_out(table):
    of = papers.beside(table, None)
    keys = {line["source"] for line in lines(papers.sheet(of)).values()}
    assert all(any(note.startswith(f"{key}: ") for note in papers.notes(of)) for key in keys)
    assert table.conditions in papers.legend(of)


def test_metrics_that_hardly_any_method_has_are_left_out():
    made = papers.sheet(papers.beside(published.load("celeba"), None))
    assert made.header == ["method", "source", "delta_m % ↓", "mean rank ↓ FAMO", "mean rank ↓ GO4Align"]
    assert "Metrics are printed for FairGrad and single-task networks only" in made.legend
    assert papers.sheet(papers.beside(published.load("metaworld"), None)).header == ["method", "source", "success ↑"]


def test_runs_on_the_same_data_stand_below_their_method():
    of = papers.beside(NYUV2, runs())
    assert of.comparable
    assert of.relation == (
        "The runs here are on NYUv2 too, but with data.protocol=sound (papers: paper), train.epochs=12 (papers: 200)."
    )
    assert of.title == "Published results on NYUv2 (not measured here, but for lines with 'here:')"
    made = papers.sheet(of)
    order = list(lines(made))
    assert order[order.index("PCGrad") + 1] == "here: ls + pcgrad"
    assert order[order.index("FAMO") + 1] == "here: famo"
    assert order[-3:] == ["here: famo + pcgrad", SINGLE_TASK, f"here: {SINGLE_TASK}"]
    assert made.methods == 21 + 3
    line = lines(made)["here: famo"]
    assert (line["source"], line["mean rank ↓ FAMO"]) == ("2 seeds", MISSING)
    # by hand: errors 10 % up in 4 metrics, shares 1 / 11 down in 5, in one of two seeds
    second = (4 * 10 + 5 * 100 / 11) / 9
    assert line["delta_m % ↓"] == f"{second / 2:.2f} ± {second / 2:.2f}"
    mean, half = STL["depth/abs_error"] * 1.05, STL["depth/abs_error"] * 0.05
    assert line["depth/abs_error ↓"] == f"{mean:.4f} ± {half:.4f}"
    assert lines(made)[f"here: {SINGLE_TASK}"]["depth/abs_error ↓"] == "0.6754"
    assert {cell.verdict for cells in made.lines for cell in cells} == {None}
    assert "their delta_m is against the same single-task networks of the papers" in made.legend


def test_runs_with_the_settings_of_the_papers():
    of = papers.beside(NYUV2, runs(settings={"data.source": "files"} | NYUV2.as_published))
    assert of.relation.endswith("and no setting is known in which they differ from the papers.")


def test_different_settings_of_the_runs_are_all_told():
    made = [
        Run(f"{epochs}", "ls", None, 0, {"data.source": "files", "train.epochs": epochs}, dict(STL))
        for epochs in ("5", "200", "10")
    ]
    compared = compare(made, experiment="nyuv2", higher_is_better=NYUV2.higher_is_better, baselines=None)
    of = papers.beside(NYUV2, compared)
    assert of.relation == "The runs here are on NYUv2 too, but with train.epochs=10 or 5 (papers: 200)."
    labels = list(lines(papers.sheet(of)))
    assert [label for label in labels if label.startswith("here")] == [f"here: ls train.epochs={n}" for n in ("10", "200", "5")]
    assert f"here: {SINGLE_TASK}" not in labels


def test_a_metric_that_the_runs_do_not_have():
    made = [Run("a", "famo", None, 0, REAL, {"depth/abs_error": 0.5})]
    compared = compare(made, experiment="nyuv2", higher_is_better=NYUV2.higher_is_better, baselines=None)
    line = lines(papers.sheet(papers.beside(NYUV2, compared)))["here: famo"]
    assert (line["depth/abs_error ↓"], line["depth/rel_error ↓"], line["delta_m % ↓"]) == ("0.5000", MISSING, "nan")
    assert line["source"] == "1 seed"


@pytest.mark.parametrize("settings", [SCENES, {"train.epochs": "12"}])
def test_runs_on_other_data_stay_out(settings):
    of = papers.beside(NYUV2, runs(settings=settings))
    assert of.comparable is False
    assert of.relation.startswith("Not comparable with the runs here: those are on other data (data.source=")
    assert lines(papers.sheet(of)) == lines(papers.sheet(papers.beside(NYUV2, None)))
    assert papers.HERE.strip() not in papers.sheet(of).legend
    assert "Not comparable" in papers.for_latex(of).legend


@pytest.mark.parametrize("settings", [REAL, SCENES])
def test_csv_tells_data_and_source_of_every_line(settings):
    compared = runs(settings=settings)
    found = list(csv.DictReader(io.StringIO(papers.in_one_csv(compared, [papers.beside(NYUV2, compared)]))))
    papers_lines = [line for line in found if line["source"]]
    assert {line["data"] for line in papers_lines} == {"NYUv2"}
    (of_runs,) = {line["data"] for line in found if not line["source"] and not line["quantity"].endswith("published")}
    assert of_runs == ("NYUv2" if settings is REAL else "data.source=scenes")
    assert {line["verdict"] for line in papers_lines} == {""}
    famo = {line["quantity"]: line for line in papers_lines if line["method"] == "FAMO"}
    assert (famo["segmentation/miou"]["mean"], famo["segmentation/miou"]["standard_error"]) == ("0.3888", "0.0054")
    assert famo["delta_m"]["source"].startswith("Liu et al.")
    assert float(famo["delta_m_recomputed"]["mean"]) == pytest.approx(-4.10, abs=0.02)
    assert (famo["depth/abs_error"]["loss_method"], famo["depth/abs_error"]["gradient_method"]) == ("famo", "")
    imtl = [line["mean"] for line in papers_lines if line["method"] == "IMTL-G" and line["quantity"] == "mean_rank"]
    assert imtl == ["3.78", "4.56", "3.11"]
    against = [line for line in found if line["quantity"] == "delta_m_against_published"]
    assert len(against) == (3 if settings is REAL else 0)


def test_csv_and_json_without_runs():
    of = papers.beside(NYUV2, None)
    found = list(csv.DictReader(io.StringIO(papers.in_one_csv(None, [of]))))
    assert {line["method"] for line in found} == {*NYUV2.methods, SINGLE_TASK}
    content = json.loads(papers.in_one_json("nyuv2", None, [of]))
    assert (content["experiment"], content["rows"]) == ("nyuv2", [])
    assert content["published"][0]["comparable_with_rows"] is None


def test_json():
    compared = runs()
    content = json.loads(papers.in_one_json("nyuv2", compared, [papers.beside(NYUV2, compared)]))
    assert [row["method"] for row in content["rows"]] == [row.label for row in compared.rows]
    (table,) = content["published"]
    assert (table["data"], table["setting"], table["comparable_with_rows"]) == ("NYUv2", "paper", True)
    rows = {row["method"]: row for row in table["methods"]}
    assert rows["IMTL-G"]["delta_m"]["recomputed"] == pytest.approx(-0.60, abs=0.005)
    assert rows["IMTL-G"]["delta_m"]["disagrees"] == "one of the two has a misprint"
    assert rows["FAMO"]["metrics"]["normals/mean_angle"] == {"value": 25.06, "standard_error": 0.06}
    assert (rows["PCGrad"]["loss_method"], rows["PCGrad"]["gradient_method"]) == ("ls", "pcgrad")
    assert (rows["STCH"]["metrics"], rows["STCH"]["delta_m"]["recomputed"]) == ({}, None)
    of_nash = table["mean_ranks"][2]["values"]
    assert of_nash["SI"]["value"] == 7.11
    assert of_nash["SI"]["recomputed"] == pytest.approx(7.0)
    assert "one place off" in of_nash["SI"]["disagrees"]
    assert set(table["delta_m_of_rows"]) == {row.label for row in compared.rows}
    assert "verdict" not in table["delta_m_of_rows"]["famo"]
    assert set(table["sources"]) >= {row["source"] for row in rows.values()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("recorded", [False, True])
def test_every_table_in_every_form(table, recorded):
    real = {"nyuv2": REAL, "cityscapes": REAL, "celeba": {"data.source": "celeba"}, "metaworld": {}}
    settings = real.get(table.experiment, {"data.path": "/data/qm9"})
    compared = runs(table, settings) if recorded else None
    of = papers.beside(table, compared)
    made = papers.sheet(of)
    assert {len(line) for line in made.lines} == {len(made.header)}
    text = markdown(made)
    assert text.startswith("**Published results on ")
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {len(made.header) + 1}
    text = latex(papers.for_latex(of))
    assert "not measured here" in text
    assert not set("±↑↓") & set(text)
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(terminal(papers.sheet(of, 6)))
    shown = console.export_text()
    assert all(name in shown for name in table.methods)
    assert "…" not in shown
    assert json.loads(papers.in_one_json(table.experiment, compared, [of]), parse_constant=pytest.fail)
    assert len(papers.in_one_csv(compared, [of]).splitlines()) > len(table.methods)


def test_few_metrics_where_there_is_no_room():
    made = papers.sheet(papers.beside(NYUV2, None), 2)
    assert len(made.header) == 6 + 2
    assert made.legend.endswith("7 further metrics are in the other formats.")
