import math

import pytest
from scipy.stats import rankdata

import balance
from balance.metrics import delta_m, mean_rank
from experiments.analysis import published_tables
from experiments.config import schema as settings
from experiments.problems import celeba, cityscapes, nyuv2

TABLES = {name: published_tables.load(name) for name in published_tables.names()}
PUBLISHED = {
    "LS": ("ls", None),
    "SI": ("scaleinvls", None),
    "RLW": ("rlw", None),
    "DWA": ("dwa", None),
    "UW": ("uw", None),
    "FAMO": ("famo", None),
    "GO4Align": ("go4align", None),
    "MGDA": ("ls", "mgda"),
    "PCGrad": ("ls", "pcgrad"),
    "GradDrop": ("ls", "graddrop"),
    "CAGrad": ("ls", "cagrad"),
    "IMTL-G": ("ls", "imtl"),
    "Nash-MTL": ("ls", "nashmtl"),
}
ROWS = [
    pytest.param(table, row, id=f"{name}-{method}")
    for name, table in TABLES.items()
    for method, row in table.methods.items()
    if row.metrics and row.delta_m
]
RANKINGS = [
    pytest.param(table, ranking, id=f"{name}-{ranking.source}")
    for name, table in TABLES.items()
    for ranking in table.rankings
    if all(table.methods[method].metrics for method in ranking.values)
]


def values(row):
    return {name: printed.value for name, printed in row.metrics.items()}


def bounds(table, row):
    """The least and the largest delta_m of metrics that would be printed like the metrics of the row."""
    ends = {name: table.interval(printed, row.source) for name, printed in row.metrics.items()}
    best = {name: high if name in table.higher_is_better else low for name, (low, high) in ends.items()}
    worst = {name: low if name in table.higher_is_better else high for name, (low, high) in ends.items()}
    return tuple(delta_m(end, table.baselines, table.higher_is_better) for end in (best, worst))


def test_the_tables_and_how_many_of_their_rows_can_be_recomputed():
    assert set(TABLES) == {"nyuv2", "cityscapes", "celeba", "quantum_chemistry", "quantum_chemistry_retuned", "metaworld"}
    assert {name: len(table.methods) for name, table in TABLES.items()} == {
        "nyuv2": 21,
        "cityscapes": 18,
        "celeba": 14,
        "quantum_chemistry": 13,
        "quantum_chemistry_retuned": 13,
        "metaworld": 15,
    }
    assert len(ROWS) == 18 + 17 + 1 + 13
    assert len(RANKINGS) == 3 + 3 + 3


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_delta_m_is_that_of_the_row_within_what_the_printed_digits_allow(table, row):
    low, high = bounds(table, row)
    least, largest = table.interval(row.delta_m, row.source)
    agrees = low <= largest and least <= high
    assert agrees == (row.disagrees is None), f"recomputed {low:.3f} to {high:.3f}, printed {row.delta_m.value}"


def test_the_intervals_are_narrow_enough_to_find_a_misprint():
    """CityScapes prints its absolute error with three digits, so delta_m is known to 0.2 there; FAMO prints QM9 with two."""
    widest = {
        name: max(bounds(t, r)[1] - bounds(t, r)[0] for r in t.methods.values() if r.metrics and r.delta_m)
        for name, t in TABLES.items()
        if name in {"nyuv2", "cityscapes", "celeba"}
    }
    assert widest["nyuv2"] < 0.03
    assert widest["cityscapes"] < 0.25
    assert widest["celeba"] < 1e-4


def test_delta_m_of_fairgrad_on_celeba_and_the_row_that_is_known_to_disagree():
    celeba, nyu = TABLES["celeba"], TABLES["nyuv2"]
    fairgrad = values(celeba.methods["FairGrad"])
    assert delta_m(fairgrad, celeba.baselines, celeba.higher_is_better) == pytest.approx(0.370, abs=5e-4)
    assert sum(celeba.baselines.values()) / 40 == pytest.approx(0.69713, abs=5e-6)
    assert [name for name, row in nyu.methods.items() if row.disagrees] == ["IMTL-G"]
    assert nyu.delta_m("IMTL-G") == pytest.approx(-0.60, abs=0.005)
    assert nyu.delta_m("STCH") is None
    assert nyu.methods["IMTL-G"].delta_m.value == -0.76


@pytest.mark.parametrize(("table", "ranking"), RANKINGS)
def test_mean_ranks_are_those_of_the_rows(table, ranking):
    """Between all ties shared at the best rank and all at the worst: unrounded digits, which nobody prints, break them."""
    rows = {method: values(table.methods[ranking.ranked_as.get(method, method)]) for method in ranking.values}
    if ranking.decimals:
        rows = {
            method: {name: round(v + 1e-9, ranking.decimals[name]) for name, v in row.items()} for method, row in rows.items()
        }
    least = mean_rank(rows, table.higher_is_better)
    assert {method: rank + 1 - ranking.first for method, rank in table.mean_ranks(ranking).items()} == pytest.approx(least)
    names = list(table.baselines)
    worst = [
        rankdata([(-1 if name in table.higher_is_better else 1) * row[name] for row in rows.values()], method="max")
        for name in names
    ]
    off = {}
    for k, (method, printed) in enumerate(ranking.values.items()):
        rank = printed.value + 1 - ranking.first
        largest = sum(float(of_metric[k]) for of_metric in worst) / len(names)
        if not least[method] - 1.001 * printed.digit <= rank <= largest + printed.digit:
            off[method] = (least[method], largest, rank)
    assert off.keys() == ranking.disagrees.keys(), off


def test_mean_ranks_of_all_methods_have_the_mean_of_places():
    """So a table whose ranks begin at zero gives itself away, and headers that are swapped."""
    for table in TABLES.values():
        for ranking in table.rankings:
            count = len(ranking.values)
            mean = sum(printed.value for printed in ranking.values.values()) / count
            assert mean == pytest.approx(ranking.first + (count - 1) / 2, abs=0.35)
            assert all(ranking.first <= printed.value <= ranking.first + count - 1 for printed in ranking.values.values())


def test_the_corrected_row_of_cityscapes_and_the_ranks_that_prove_it():
    table = TABLES["cityscapes"]
    ls, si = table.methods["LS"], table.methods["SI"]
    assert values(ls) != values(si)
    assert (ls.delta_m.value, si.delta_m.value) == (22.60, 14.11)
    assert "SI" in ls.note
    of_famo, of_go4align, _ = table.rankings
    assert (of_famo.ranked_as, of_go4align.ranked_as) == ({}, {"LS": "SI"})
    rows = {method: values(table.methods[method]) for method in of_famo.values}
    assert mean_rank(rows, table.higher_is_better)["LS"] == of_famo.values["LS"].value
    swapped = mean_rank(rows | {"LS": values(si)}, table.higher_is_better)
    assert swapped["LS"] != of_famo.values["LS"].value


def test_columns_of_celeba_are_under_the_right_headers():
    table = TABLES["celeba"]
    of_famo = table.rankings[0]
    assert table.methods["FAMO"].delta_m.value == 1.21
    assert of_famo.values["FAMO"].value == 4.72
    assert table.methods["MGDA"].delta_m.value > len(of_famo.values) >= of_famo.values["MGDA"].value


def in_code(name):
    if name == "quantum_chemistry":
        pytest.importorskip("torch_geometric")
        from experiments.problems import quantum_chemistry

        return quantum_chemistry
    return {"nyuv2": nyuv2, "cityscapes": cityscapes, "celeba": celeba}[name]


@pytest.mark.parametrize("name", [name for name in TABLES if name != "metaworld"])
def test_metrics_and_settings_are_those_of_the_experiment(name):
    table = TABLES[name]
    experiment = in_code(table.experiment)
    assert list(table.baselines) == list(experiment.metrics())
    assert table.higher_is_better == experiment.HIGHER_IS_BETTER
    schema = {"data": experiment.DataConfig, "model": experiment.ModelConfig, "train": settings.TrainConfig}
    assert table.as_published
    for key in (*table.elsewhere, *table.as_published):
        part, _, entry = key.rpartition(".")
        assert entry in (schema[part] if part else settings.RunConfig).__dataclass_fields__, key


@pytest.mark.parametrize("name", [name for name in TABLES if name != "metaworld"])
def test_a_run_with_the_defaults_of_the_experiment_is_on_other_data(name):
    table = TABLES[name]
    defaults = {f"data.{key}": str(value) for key, value in vars(in_code(table.experiment).DataConfig()).items()}
    assert not table.has_data_of(defaults)
    assert not table.has_data_of({})
    real = {
        "nyuv2": {"data.source": "files"},
        "cityscapes": {"data.source": "files"},
        "celeba": {"data.source": "celeba"},
        "quantum_chemistry": {"data.source": "qm9"},
    }[table.experiment]
    assert table.has_data_of(defaults | real)


def test_differences_from_the_settings_of_the_papers():
    table = TABLES["nyuv2"]
    settings = {"data.protocol": "sound", "train.epochs": "200", "train.lr": "0.001", "other": "1"}
    assert table.differences(settings) == {"data.protocol": ("sound", "paper"), "train.lr": ("0.001", "0.0001")}
    assert table.differences(table.as_published) == {}


def test_mt10_has_errors():
    assert TABLES["metaworld"].methods["FAMO"].metrics["all/success"] == (0.83, 0.01, 0.05)


def test_values_in_the_units_of_a_run():
    table = TABLES["nyuv2"]
    found = table.in_experiment_units(table.methods["FAMO"])
    assert found["segmentation/miou"] == (0.3888, 0.0001, 0.0054)
    assert found["normals/within_30"].value == 0.6898
    assert found["depth/abs_error"] == table.methods["FAMO"].metrics["depth/abs_error"] == (0.5474, 0.0001, 0.0016)
    assert table.in_experiment_units(table.methods["STCH"]) == {}


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes", "celeba"])
def test_what_the_experiments_report_as_shares_are_shares(name):
    table = TABLES[name]
    for row in (table.single_task, *table.methods.values()):
        shares = {metric: printed.value for metric, printed in table.in_experiment_units(row).items()}
        assert all(0.2 < shares[metric] < 1 for metric in table.higher_is_better & shares.keys())


def test_published_methods_are_registered_with_their_labels():
    methods = published_tables.registered_methods()
    for loss, gradient in methods.values():
        assert loss in balance.loss_balancers
        assert gradient is None or gradient in balance.gradient_balancers
    for table in (TABLES["nyuv2"], TABLES["cityscapes"]):
        assert PUBLISHED.items() <= methods.items()
        assert PUBLISHED.keys() <= table.methods.keys()


def test_digits_are_counted_as_printed():
    cagrad = TABLES["nyuv2"].methods["CAGrad"]
    assert cagrad.delta_m == (0.20, 0.01, None)
    table = TABLES["quantum_chemistry"]
    assert table.interval(table.methods["LS"].metrics["homo/mae"], "Nash-MTL") == pytest.approx((73.57, 73.58))
    assert table.interval(table.methods["FAMO"].metrics["homo/mae"], "FAMO") == pytest.approx((93.95, 94.05))
    assert table.methods["UW"].delta_m.error == 22.5
    assert math.isclose(table.methods["FAMO"].metrics["cv/mae"].digit, 0.01)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("values: 75.18 93.49 0.0155 46.77", "values: 75.18 93.49 0.0155", r"'LS' must have 4 values"),
        ("source: SDMGrad", "source: SDMgrad", "Did you mean 'SDMGrad'"),
        ("LS: 6.50", "LSS: 6.50", "Unknown ranked method 'LSS'"),
        ("{better: higher, factor: 0.01}", "{better: high, factor: 0.01}", "must be higher or lower"),
        ("methods:\n", "rows:\n", "'methods'"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(tmp_path, old, new, message):
    text = (published_tables.PROBLEMS / "cityscapes" / "published.yaml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "broken.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        published_tables.read_file(file)
    assert "broken.yaml" in str(error.value)


def test_tables_of_an_experiment():
    assert published_tables.experiments() == ("celeba", "cityscapes", "metaworld", "nyuv2", "quantum_chemistry")
    assert [table.setting for table in published_tables.for_experiment("quantum_chemistry")] == ["paper", "retuned"]
    assert [table.data for table in published_tables.for_experiment("metaworld")] == ["Meta-World MT10"]
    with pytest.raises(ValueError, match=r"'digits' are available\. Available: celeba, cityscapes, metaworld, nyuv2, quantum"):
        published_tables.for_experiment("digits")


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'nyuv2'"):
        published_tables.load("nyu2")
