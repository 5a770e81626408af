from dataclasses import dataclass, field
from typing import Literal

import pytest
from omegaconf import OmegaConf

from balance.config import setting
from experiments import trainer
from experiments.config.description import Entry, entries
from tests.experiments.short_runs import configure


@dataclass
class Inner:
    share: float | None = setting(None, minimum=0, below=1, help="a share")
    sizes: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class Outer:
    kind: Literal["a", "b"] | None = "a"
    flag: bool = setting(True, help="a choice")
    name: str = setting("x", choices=("x", "y"))
    inner: Inner = field(default_factory=Inner)


def test_every_entry_has_value_range_and_role():
    assert list(entries(OmegaConf.structured(Outer))) == [
        Entry("kind", "a", "a | b | null", ""),
        Entry("flag", "true", "bool", "a choice"),
        Entry("name", "x", "x | y", ""),
        Entry("inner.share", "null", "float >= 0 and < 1 | null", "a share"),
        Entry("inner.sizes", "[1, 2]", "list[int]", ""),
    ]


@pytest.mark.parametrize("methods", [[], ["--loss_method=famo+uw", "--gradient_method=nashmtl"]])
def test_settings_are_listed_and_nothing_else_done(methods, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert trainer.main(["--list_settings", *methods, "train.epochs=7"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "train.epochs" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["train.epochs", "7", "int >= 1", "passes over the training data"]
    assert list(tmp_path.iterdir()) == []


def test_every_entry_of_a_run_has_a_role():
    groups = ("loss.", "gradient.", "data.", "model.")
    assert all(entry.role for entry in entries(configure()) if not entry.key.startswith(groups))
