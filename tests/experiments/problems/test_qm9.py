import math
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("torch_geometric")

from experiments.problems.quantum_chemistry import DataConfig, load, qm9
from experiments.problems.quantum_chemistry.data import UNITS
from tests.writers.qm9 import CSV_HEADER, pieces, write_qm9

HARTREE, KCAL = 27.211386246, 0.04336414  # in eV, as torch_geometric has them
SMALL = {"validation_molecules": 1, "test_molecules": 1}


def expected_targets(values):
    """The 11 targets of the benchmark from the columns of the table, in eV, D, a0, cal / mol K."""
    columns = dict(zip(CSV_HEADER.split(",")[1:], values.T, strict=True))
    scale = dict.fromkeys(("homo", "lumo", "zpve"), HARTREE)
    scale |= dict.fromkeys(("u0_atom", "u298_atom", "h298_atom", "g298_atom"), KCAL)
    order = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0_atom", "u298_atom", "h298_atom", "g298_atom", "cv")
    return np.stack([columns[name] * scale.get(name, 1) for name in order], axis=1)


def no_download(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch_geometric.datasets.qm9.download_url", refuse)


def test_qm9_is_read_from_its_raw_files(tmp_path, monkeypatch):
    pytest.importorskip("rdkit")
    no_download(monkeypatch)
    values = expected_targets(write_qm9(tmp_path, count=6, excluded=(3,)))
    splits = load(DataConfig("qm9", str(tmp_path), **SMALL))
    included = [0, 1, 3, 4, 5]
    assert [len(split) for split in splits] == [3, 1, 1]
    np.testing.assert_allclose(splits.train.graphs.targets, values[included], rtol=1e-5)
    training = values[included][splits.train.members.tolist()]
    standardised = (values[included] - training.mean(0)) / training.std(0, ddof=1)
    for split in splits:
        graphs, answers = split[list(range(len(split)))]
        np.testing.assert_allclose(answers, standardised[split.members.tolist()], rtol=1e-4)
        np.testing.assert_allclose(graphs.deviations, training.std(0, ddof=1) * UNITS.numpy(), rtol=1e-5)
    elements, positions, bonds = pieces(6)[included[splits.test.members.item()]]
    graph, _ = splits.test[[0]]
    assert graph.x[:, 5].tolist() == elements.tolist()
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.testing.assert_allclose(graph.edge_attr[:, 4], distances[tuple(graph.edge_index)], atol=1e-3)
    order = np.zeros(distances.shape, dtype=int)
    order[bonds[:, 0], bonds[:, 1]] = order[bonds[:, 1], bonds[:, 0]] = bonds[:, 2]
    np.testing.assert_array_equal(graph.edge_attr[:, :4] @ torch.tensor([1.0, 2, 3, 4]), order[tuple(graph.edge_index)])

    for file in (tmp_path / "raw").iterdir():  # what torch_geometric has made is enough
        file.unlink()
    again = load(DataConfig("qm9", str(tmp_path), **SMALL))
    assert torch.equal(again.test[[0]][0].edge_attr, graph.edge_attr)
    (tmp_path / "processed" / "data_v3.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"data_v3\.pt is truncated, damaged or"):
        load(DataConfig("qm9", str(tmp_path), **SMALL))


def test_shipped_molecules_get_the_features_that_torch_geometric_gives_qm9(tmp_path):
    pytest.importorskip("rdkit")
    write_qm9(tmp_path, count=40, excluded=())
    from_sdf = load(DataConfig("qm9", str(tmp_path), **SMALL)).train.graphs
    shipped = load(DataConfig()).train.graphs
    assert torch.equal(from_sdf.nodes, shipped.nodes[: len(from_sdf.nodes)])
    assert torch.equal(from_sdf.bonds, shipped.bonds[: len(from_sdf.bonds)])
    torch.testing.assert_close(from_sdf.distances, shipped.distances[: len(from_sdf.distances)], atol=1e-3, rtol=0)


@pytest.mark.parametrize("rdkit", [True, False])
def test_qm9_is_read_from_the_preprocessed_file_with_and_without_rdkit(tmp_path, monkeypatch, rdkit):
    no_download(monkeypatch)
    if not rdkit:
        monkeypatch.setitem(sys.modules, "rdkit", None)
    y = torch.randn(4, 19)
    saved = [
        {
            "x": torch.eye(11)[: k + 2],
            "pos": torch.arange(3.0 * (k + 2)).view(-1, 3),
            "edge_index": torch.tensor([[0, 1], [1, 0]]),
            "edge_attr": torch.tensor([[0.0, 1, 0, 0]] * 2),
            "y": y[k : k + 1],
            "name": f"gdb_{k}",
        }
        for k in range(4)
    ]
    (tmp_path / "raw").mkdir()
    torch.save(saved, tmp_path / "raw" / "qm9_v3.pt")
    graphs = load(DataConfig("qm9", str(tmp_path), **SMALL)).train.graphs
    assert graphs.sizes.tolist() == [2, 3, 4, 5]
    assert torch.equal(graphs.targets.float(), y[:, [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]])
    assert graphs.distances[:2].tolist() == pytest.approx([27**0.5] * 2)
    assert graphs.bonds.tolist() == [2, 2, *([2, 0, 2, 0, 0, 0]), *([2, 0, 0, 2] + [0] * 8), *([2, 0, 0, 0, 2] + [0] * 15)]


def molecules_as_saved(**changed):
    """Two molecules of two atoms, as torch_geometric keeps them."""
    data = {
        "x": torch.zeros(4, 11),
        "pos": torch.arange(12.0).view(4, 3),
        "edge_index": torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]),
        "edge_attr": torch.eye(4),
        "y": torch.arange(38.0).view(2, 19),
    }
    slices = {name: torch.tensor([0, 2, 4]) for name in ("x", "pos", "edge_index", "edge_attr")} | {"y": torch.arange(3)}
    return {name: value for name, value in (data | changed).items() if value is not None}, slices


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"nothing of the kind", "Error"),
        (3, "TypeError"),
        ({"x": 1}, "KeyError|TypeError"),
        (molecules_as_saved(pos=None), "KeyError"),
        (molecules_as_saved(pos=torch.zeros(3, 3)), r"pos must have shape \(4, 3\), but has \(3, 3\)"),
        (molecules_as_saved(x=torch.zeros(4, 7)), r"x must have shape \(4, 11\)"),
        (molecules_as_saved(edge_attr=torch.zeros(4, 3)), r"edge_attr must have shape \(4, 4\)"),
        (molecules_as_saved(y=torch.zeros(2, 12)), r"y must have shape \(2, 19\)"),
        (molecules_as_saved(y=torch.full((2, 19), math.nan)), "y has a number that is not finite"),
    ],
)
@pytest.mark.parametrize(("name", "remedy"), [("processed/data_v3.pt", "Remove it"), ("raw/qm9_v3.pt", "Copy it again")])
def test_a_damaged_file_of_torch_geometric_is_named(tmp_path, monkeypatch, content, reason, name, remedy):
    no_download(monkeypatch)
    file = tmp_path / name
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=rf"{name} is truncated, damaged or of something else \(.*\)\. {remedy}") as error:
        load(DataConfig("qm9", str(tmp_path), **SMALL))
    assert name.startswith("raw") or re.search(reason, str(error.value))


def test_molecules_that_torch_geometric_has_saved(tmp_path):
    (tmp_path / "processed").mkdir()
    torch.save(molecules_as_saved(), tmp_path / "processed" / "data_v3.pt")
    assert qm9.read(tmp_path).sizes.tolist() == [2, 2]


def test_raw_files_without_rdkit_are_refused_with_the_remedy(tmp_path, monkeypatch):
    no_download(monkeypatch)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    write_qm9(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"gdb9\.sdf can only be read with RDKit: pip install -e . --group molecules"):
        load(DataConfig("qm9", str(tmp_path), **SMALL))


def test_a_target_without_spread_is_refused(tmp_path):
    pytest.importorskip("rdkit")
    write_qm9(tmp_path)
    table = tmp_path / "raw" / "gdb9.sdf.csv"
    header, *rows = table.read_text().splitlines()
    flat = [",".join([*row.split(",")[:4], "1.5", *row.split(",")[5:]]) for row in rows]
    table.write_text("\n".join([header, *flat]) + "\n")
    with pytest.raises(ValueError, match="mu cannot be standardised: all 3 training molecules have one value"):
        load(DataConfig("qm9", str(tmp_path), **SMALL))


@pytest.mark.parametrize("name", ["gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, name):
    no_download(monkeypatch)
    write_qm9(tmp_path)
    (tmp_path / "raw" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {name}\. Put"):
        load(DataConfig("qm9", str(tmp_path), **SMALL))


def cut(lines):
    """Without so many of its last lines."""
    return lambda text: "".join(text.splitlines(keepends=True)[:-lines])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gdb9.sdf", lambda text: text[:-40], r"gdb9\.sdf is truncated: it must end with \$\$\$\$.* after 5 complete"),
        ("gdb9.sdf", lambda text: "$$$$\n".join(text.split("$$$$\n")[:4]) + "$$$$\n", r"gdb9\.sdf is truncated: .*4 mol.* 6\."),
        ("gdb9.sdf", lambda text: "", r"gdb9\.sdf is truncated"),
        ("gdb9.sdf.csv", lambda text: text[:-30], r"gdb9\.sdf\.csv is truncated: .* 20 values, but line 7 has \d+"),
        ("gdb9.sdf.csv", lambda text: text[:-1], r"gdb9\.sdf\.csv is truncated: its last line, 7, does not end"),
        ("gdb9.sdf.csv", cut(2), r"gdb9\.sdf\.csv is truncated: gdb9\.sdf has 6 molecules, but gdb9\.sdf\.csv 4"),
        ("gdb9.sdf.csv", lambda text: "", r"gdb9\.sdf\.csv is truncated"),
        ("uncharacterized.txt", lambda text: text[:-3], r"uncharacterized\.txt is truncated"),
        ("uncharacterized.txt", lambda text: "", r"uncharacterized\.txt is truncated"),
        (
            "uncharacterized.txt",
            lambda text: text.replace("    3 ", "   99 "),
            r"line 10: must start with a number from 1 to 6",
        ),
    ],
)
def test_a_truncated_file_is_named(tmp_path, monkeypatch, name, damage, message):
    no_download(monkeypatch)
    write_qm9(tmp_path)
    file = tmp_path / "raw" / name
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    with pytest.raises(ValueError, match=message):
        load(DataConfig("qm9", str(tmp_path), **SMALL))


def test_of_all_qm9_the_list_of_excluded_molecules_must_be_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.problems.quantum_chemistry.qm9.MOLECULES", 6)
    write_qm9(tmp_path)
    with pytest.raises(ValueError, match=r"uncharacterized\.txt is truncated: it must list 3054 molecules, but lists 1"):
        load(DataConfig("qm9", str(tmp_path), **SMALL))
