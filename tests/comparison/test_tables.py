import csv
import io
import json
import math
import re

import pytest
from rich.console import Console

from balance.comparison.tables import MISSING, Cell, cells, legend, number_format, render
from tests.comparison.synthetic import comparison, estimate, realistic, row, two_rows

NAN = math.nan
ROUGH = "a<b> & c_d 50% $x$ #1 {e} ~f ^g \\h |i| *j* -5"


def texts(of):
    header, lines = cells(of)
    return [dict(zip(header, (cell.text for cell in line), strict=True)) for line in lines]


def rough():
    """Names that each format must escape, and numbers below zero."""
    metrics = {"a_b/c%": estimate(-1.5, -2.5, verdict="best")}
    drops = estimate(-3.0, -4.0, verdict="best")
    return comparison(row(ROUGH, seeds=2, metrics=metrics, delta_m=drops), baselines={"a_b/c%": -2.0}, higher=())


def test_cells():
    header, lines = cells(two_rows())
    columns = ["method", "seeds", "delta_m % ↓", "95 % interval", "mean rank ↓", "left/accuracy ↑", "sum/mae ↓"]
    assert header == [*columns, "time / ls", "memory MiB"]
    # the errors of delta_m are 1 / sqrt(3) and 7 / sqrt(3); t has its 97.5 % point at 4.303
    assert lines[0][:5] == [
        Cell("famo"),
        Cell("3"),
        Cell("4.0 ± 0.6", "best"),
        Cell("1.5 to 6.5"),
        Cell("1.50"),
    ]
    assert lines[1][2:4] == [Cell("6.0 ± 4.0", "alike"), Cell("-11.4 to 23.4")]
    assert lines[0][5:] == [Cell("0.970 ± 0.006", "alike"), Cell("1.50 ± 0.14", "best"), Cell("1.00"), Cell("2.50")]
    assert [cell.text for cell in lines[2]] == ["single-task networks", "", "0.0", "", "", "0.990", "1.20", "", ""]


def test_marks():
    assert [Cell("1", verdict).marked for verdict in ("best", "alike", "worse", "unclear", None)] == [
        "1",
        "1 ≈",
        "1",
        "1 ?",
        "1",
    ]


def test_without_baselines_there_is_no_delta_m_and_no_last_row():
    header, lines = cells(realistic(baselines=False))
    assert header[:3] == ["method", "seeds", "mean rank ↓"]
    assert len(lines) == 13
    assert "delta_m" not in legend(realistic(baselines=False))


def test_one_seed_has_neither_error_nor_interval():
    (line, _) = texts(comparison(row(seeds=1, metrics={"sum/mae": estimate(1.234)}, delta_m=estimate(5.0))))
    assert (line["sum/mae ↓"], line["delta_m % ↓"], line["seeds"]) == ("1.23", "5.00", "1")
    assert "95 % interval" not in line  # nobody has one


def test_what_is_missing_or_not_a_number():
    nothing = row("uw", metrics={"a/b": estimate(1.0, NAN, 2.0)}, delta_m=estimate(1.0, NAN, 2.0), time=NAN, failed=2)
    some = row(metrics={"a/b": estimate(1.0, 1.5, 2.0), "c/d": estimate(1.0, 2.0, math.inf)}, delta_m=estimate(1.0, 2.0, 3.0))
    first, second, _ = texts(comparison(some, nothing, metrics=("a/b", "c/d")))
    assert (first["a/b ↓"], first["c/d ↓"]) == ("1.50 ± 0.29", "inf")
    assert (second["a/b ↓"], second["c/d ↓"], second["delta_m % ↓"], second["95 % interval"]) == (
        "nan",
        MISSING,
        "nan",
        MISSING,
    )
    assert (second["time / ls"], second["seeds"]) == (MISSING, "3, 2 failed")
    assert "memory MiB" not in cells(comparison(row(metrics={"a/b": estimate(1.0)}, memory=NAN)))[0]


@pytest.mark.parametrize(
    ("numbers", "errors", "written"),
    [
        ([3.371], [0.954], "3.4"),  # an error of 1.0
        ([3.371], [0.234], "3.37"),  # 0.23: two digits
        ([0.9712], [0.004], "0.971"),
        ([0.9712, 0.9], [0.004, 0.0002], "0.9712"),  # else the second would have an error of 0.000
        ([15280.0], [310.0], "15280"),
        ([1.2345], [], "1.23"),
        ([1.2345], [0.0, NAN], "1.23"),
        ([0.0], [], "0.00"),
        ([-0.001, 5.0], [0.1, 0.1], "0.00"),  # not -0.00
        ([1.5e-9], [2e-10], "1.50e-09"),
        ([1.5e12], [], "1.50e+12"),
        ([NAN, 2.0], [], "nan"),
    ],
)
def test_digits(numbers, errors, written):
    assert number_format(numbers, errors)(numbers[0]) == written


def test_legend_explains_what_is_there():
    text = legend(two_rows())
    assert "bold: best" in text
    assert "≈: not distinguishable" in text
    assert "?: too few seeds" in text
    assert "(a file)" in text
    assert "2 methods only" in text
    assert "≈" not in legend(rough())


def test_markdown():
    first, rule, famo, uw, single, blank, below = render(two_rows(), "markdown").splitlines()
    assert first.startswith("| method | seeds | delta\\_m % ↓ | 95 % interval |")
    assert rule == "| --- |" + " ---: |" * 8
    assert famo == "| famo | 3 | **4.0 ± 0.6** | 1.5 to 6.5 | 1.50 | 0.970 ± 0.006 ≈ | **1.50 ± 0.14** | 1.00 | 2.50 |"
    assert "| 6.0 ± 4.0 ≈ |" in uw
    assert "| **0.980 ± 0.000** | 2.25 ± 0.14 ? |" in uw
    assert single.startswith("| single-task networks |  | 0.0 |")
    assert (blank, below) == ("", legend(two_rows()).replace("_", "\\_"))


def test_markdown_escapes():
    line = render(rough(), "markdown").splitlines()[2]
    assert r"| a\<b\> & c\_d 50% $x$ #1 {e} ~f ^g \\h \|i\| \*j\* -5 |" in line


def test_latex():
    text = render(rough(), "latex")
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    label = r"a$<$b$>$ \& c\_d 50\% \$x\$ \#1 \{e\} \textasciitilde{}f \textasciicircum{}g"
    assert label + r" \textbackslash{}h $|$i$|$ *j* -5 & 2 &" in text
    assert r"& \textbf{$-$3.5 $\pm$ 0.5} & $-$9.9 to 2.9 &" in text
    assert r"a\_b/c\% $\downarrow$" in text
    assert text.count(r"\begin{tabular}{lrrrrrrr}") == text.count(r"\end{tabular}") == 1
    assert [text.count(rf"\{kind}rule") for kind in ("top", "mid", "bottom")] == [1, 2, 1]
    assert not set("±≈↑↓<>_%&#$" + MISSING) & set(unescaped(text))
    assert {line.count("&") for line in render(realistic(), "latex").splitlines() if line.endswith(r"\\")} == {10}


def unescaped(text):
    """The text of the cells without formulas and escaped characters."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%")).replace(" & ", " ")
    return re.sub(r"\$-\$|\$[<>|]\$|\$\\[a-z]+\$|\\[&%$#_{}]", "", body)


@pytest.mark.parametrize("made", [two_rows, realistic, rough, lambda: realistic(baselines=False, seeds=1)])
def test_csv_has_all_digits(made):
    of = made()
    lines = list(csv.DictReader(io.StringIO(render(of, "csv"))))
    for line in of.rows:
        mine = {entry["quantity"]: entry for entry in lines if entry["method"] == line.label}
        assert set(mine) == {*line.metrics, "mean_rank", "time", "memory", *(["delta_m"] if line.delta_m else [])}
        for name, measured in {**line.metrics, **({"delta_m": line.delta_m} if line.delta_m else {})}.items():
            entry = mine[name]
            expected = [measured.mean, measured.error, *measured.interval]
            found = [float(entry[key]) for key in ("mean", "standard_error", "low", "high")]
            assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
            assert entry["verdict"] == measured.verdict
            values = dict(zip(map(int, entry["seeds"].split()), map(float, entry["values"].split()), strict=True))
            assert values == measured.values
            assert entry["run_ids"].split() == [run.run_id for run in line.runs]
        assert (float(mine["time"]["mean"]), mine["time"]["verdict"]) == (line.time, "")
    single = {entry["quantity"]: float(entry["mean"]) for entry in lines if entry["method"] == "single-task networks"}
    assert single == (of.baselines or {})


def test_json_has_all_digits():
    of = two_rows()
    content = json.loads(render(of, "json"))
    assert content["mean_ranks_are_among"] == ["famo", "uw + pcgrad"]
    assert content["metrics"] == [
        {"name": "left/accuracy", "higher_is_better": True},
        {"name": "sum/mae", "higher_is_better": False},
    ]
    assert (content["baselines"], content["baselines_from"], content["notes"]) == (of.baselines, "a file", ["A note."])
    for found, line in zip(content["rows"], of.rows, strict=True):
        assert [found[key] for key in ("method", "seeds", "failed")] == [line.label, [0, 1, 2], 0]
        assert found["runs"] == [{"run_id": run.run_id, "seed": run.seed} for run in line.runs]
        for entry, measured in ((found["delta_m"], line.delta_m), (found["metrics"]["sum/mae"], line.metrics["sum/mae"])):
            assert (entry["low"], entry["high"]) == measured.interval
            assert entry["values"] == {str(seed): value for seed, value in measured.values.items()}
            assert [entry[key] for key in ("mean", "standard_error", "verdict")] == [
                measured.mean,
                measured.error,
                measured.verdict,
            ]


def test_json_has_null_for_what_is_no_number():
    broken = row(metrics={"a/b": estimate(NAN, 1.0, 2.0)}, time=NAN)
    (line,) = json.loads(render(comparison(broken), "json"), parse_constant=pytest.fail)["rows"]
    assert (line["time"], line["delta_m"], line["gradient_method"]) == (None, None, None)
    assert line["metrics"]["a/b"] == {
        "mean": None,
        "standard_error": None,
        "low": None,
        "high": None,
        "verdict": "unclear",
        "values": {"0": None, "1": 1.0, "2": 2.0},
    }


def test_terminal():
    table = render(two_rows(), "table")
    assert [table.columns[2]._cells[k].style for k in range(3)] == ["bold", "", "dim"]
    console = Console(width=140, record=True, quiet=False, file=io.StringIO())
    console.print(table)
    shown = " ".join(console.export_text().split())
    assert "famo 3 4.0 1.5 1.50" in shown.replace("± 0.6 ", "")
    assert legend(two_rows()) in shown


def test_terminal_takes_markup_for_text():
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(render(comparison(row("[red]x[/red]", metrics={"a/b": estimate(1.0)})), "table"))
    assert "[red]x[/red]" in console.export_text()


def test_terminal_leaves_out_what_does_not_fit():
    of = realistic(tasks=[f"task{k}" for k in range(40)])
    assert len(cells(of)[0]) == 47
    table = render(of, "table")
    assert len(table.columns) == 7 + 6
    assert "34 further metrics" in str(table.caption)
