"""The contract that every problem's folder fulfils."""

from types import ModuleType

import pytest
import torch
from torch import nn

from experiments.problems import base, digits, nyuv2
from experiments.problems.base import Heads, NoOptions, ScalarHead, check_source, find, names, summaries, under


@pytest.mark.parametrize("name", names())
def test_a_problem_exports_what_its_folder_exports(name):
    if name == "quantum_chemistry":
        pytest.importorskip("torch_geometric")
    problem, folder = find(name), __import__(f"experiments.problems.{name}", fromlist=["*"])
    assert (problem.TASKS, problem.HIGHER_IS_BETTER) == (folder.TASKS, folder.HIGHER_IS_BETTER)
    assert set(problem.metrics()) >= problem.HIGHER_IS_BETTER or problem.task_names
    assert {metric.partition("/")[0] for metric in problem.metrics()} == set(problem.TASKS)
    assert problem.load is folder.load


def test_names_that_a_folder_may_leave_out_have_defaults():
    assert (find("digits").ON_DISK, find("digits").score, find("digits").ModelConfig) == (None, None, NoOptions)
    torch.manual_seed(0)
    built = find("digits").build_model(NoOptions())
    torch.manual_seed(0)
    for key, value in digits.build_model().state_dict().items():
        assert torch.equal(built.state_dict()[key], value)
    assert find("celeba").ON_DISK == "celeba"
    assert find("celeba").score({"bald/f1": 0.25, "male/f1": 0.75}) == -0.5


def test_a_name_that_is_missing_in_a_folder_is_named(monkeypatch):
    folder = ModuleType("digits")
    folder.__dict__.update({key: value for key, value in vars(digits).items() if key not in ("TASKS", "targets")})
    monkeypatch.setattr(base, "import_module", lambda _: folder)
    with pytest.raises(ValueError, match=r"digits/__init__\.py must export all names of a problem, but lacks TASKS, targets"):
        find("digits")


def test_a_protocol_is_bound_where_losses_and_metrics_depend_on_it():
    problem = find("digits")
    assert under("paper", problem) == problem
    paper = under("paper", find("nyuv2"))
    assert type(paper.metrics()["depth/abs_error"]).__name__ == "BatchMean"
    assert paper.losses.keywords == {"protocol": "paper"}
    assert paper.targets is nyuv2.targets


def test_summaries_are_the_first_lines_of_the_docstrings():
    lines = summaries()
    assert tuple(lines) == names()
    assert lines["digits"] == digits.__doc__.splitlines()[0]
    assert all(20 < len(line) < 140 for line in lines.values())


def test_heads_take_one_input_or_one_for_each_task():
    torch.manual_seed(0)
    heads = Heads({"a": nn.Linear(3, 2), "b": ScalarHead(3)})
    x, y = torch.rand(5, 3), torch.rand(5, 3)
    assert heads(x)["b"].shape == (5,)
    for outputs in (heads((x, y)), heads({"b": y, "a": x})):
        assert list(outputs) == ["a", "b"]
        assert torch.equal(outputs["a"], heads(x)["a"])
        assert torch.equal(outputs["b"], heads(y)["b"])
    with pytest.raises(ValueError, match="zip"):
        heads((x,))


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("files", None, r"data\.path must be the folder with train and val, but got None\. Set data\.path=FOLDER\."),
        ("made", "x", r"data\.source must be files where data\.path is given, but got made\. Leave one of them out\."),
    ],
)
def test_source_and_path_go_together(source, path, message):
    check_source("files", "x", "files", "train and val")
    check_source("made", None, "files", "train and val")
    with pytest.raises(ValueError, match=message):
        check_source(source, path, "files", "train and val")


def test_any_other_library_that_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(base, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"'celeba' needs PIL: pip install -e \. --group experiments"):
        find("celeba")
