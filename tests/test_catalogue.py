import subprocess
import sys

import pytest

from balance import catalogue, gradient_balancers, loss_balancers
from balance.__main__ import main


@pytest.fixture(scope="module")
def lines():
    return {(entry.kind, entry.name): entry for entry in catalogue.entries()}


def test_the_table_lists_every_method_with_a_measured_cost(lines):
    expected = {("loss", name) for name in loss_balancers.names()} | {("gradient", name) for name in gradient_balancers.names()}
    assert set(lines) == expected
    assert all(entry.milliseconds > 0 for entry in lines.values())
    assert lines["loss", "famo"][2:5] == ("famo", "positive losses, observe", "buffers")
    assert lines["loss", "uw"].state == "trained"
    assert lines["gradient", "pcgrad"].state == "random"
    assert lines["gradient", "mgda"].state == "-"
    assert lines["gradient", "graddrop"].needs == "Jacobian"


def test_the_table_is_aligned(monkeypatch, lines):
    monkeypatch.setattr(catalogue, "entries", lambda: list(lines.values()))
    head, *rows = catalogue.table().splitlines()
    place = head.index("family")
    assert head.split()[0] == "name"
    assert all(row[place - 2 : place] == "  " and row[place] != " " for row in rows)


@pytest.mark.parametrize("name", [*loss_balancers.names(), *gradient_balancers.names()])
def test_every_method_has_a_page(name, monkeypatch):
    monkeypatch.setattr(catalogue, "cost_of", lambda kind, name: 1.0)
    text = catalogue.page(name)
    assert text.startswith(f"{name}: ")
    assert "options:" in text
    registry = loss_balancers if name in loss_balancers else gradient_balancers
    assert all(f"{option}=" in text for option in registry.options(name))


def test_command_line(capsys):
    assert main(["methods", "cagrad"]) == 0
    assert "c=0.4" in capsys.readouterr().out
    assert main(["methods", "cagard"]) == 2
    assert "Did you mean 'cagrad'" in capsys.readouterr().err


def test_the_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "balance", "methods", "mgda"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mgda: MGDA (gradient balancer)")
