import csv
import io
import json

import pytest

from balance.comparison.tables import SINGLE_TASK
from experiments.analysis.published_comparison import compare_with_published
from experiments.analysis.published_export import as_csv, as_json
from tests.experiments.analysis.published_runs import NYUV2, REAL, SCENES, compared_runs


@pytest.mark.parametrize("settings", [REAL, SCENES])
def test_csv_has_data_and_source_of_every_line(settings):
    compared = compared_runs(settings=settings)
    lines = list(csv.DictReader(io.StringIO(as_csv(compared, [compare_with_published(NYUV2, compared)]))))
    papers_lines = [line for line in lines if line["source"]]
    assert {line["data"] for line in papers_lines} == {"NYUv2"}
    (of_runs,) = {line["data"] for line in lines if not line["source"] and not line["quantity"].endswith("published")}
    assert of_runs == ("NYUv2" if settings is REAL else "data.source=scenes")
    assert {line["verdict"] for line in papers_lines} == {""}
    famo = {line["quantity"]: line for line in papers_lines if line["method"] == "FAMO"}
    assert (famo["segmentation/miou"]["mean"], famo["segmentation/miou"]["standard_error"]) == ("0.3888", "0.0054")
    assert famo["delta_m"]["source"].startswith("Liu et al.")
    assert float(famo["delta_m_recomputed"]["mean"]) == pytest.approx(-4.10, abs=0.02)
    assert (famo["depth/abs_error"]["loss_method"], famo["depth/abs_error"]["gradient_method"]) == ("famo", "")
    imtl = [line["mean"] for line in papers_lines if line["method"] == "IMTL-G" and line["quantity"] == "mean_rank"]
    assert imtl == ["3.78", "4.56", "3.11"]
    against = [line for line in lines if line["quantity"] == "delta_m_against_published"]
    assert len(against) == (3 if settings is REAL else 0)


def test_csv_and_json_without_runs():
    published = compare_with_published(NYUV2, None)
    lines = list(csv.DictReader(io.StringIO(as_csv(None, [published]))))
    assert {line["method"] for line in lines} == {*NYUV2.methods, SINGLE_TASK}
    content = json.loads(as_json("nyuv2", None, [published]))
    assert (content["experiment"], content["rows"]) == ("nyuv2", [])
    assert content["published"][0]["comparable_with_rows"] is None


def test_json():
    compared = compared_runs()
    content = json.loads(as_json("nyuv2", compared, [compare_with_published(NYUV2, compared)]))
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
