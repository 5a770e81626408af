"""The sweep file with all methods: each of its configurations is valid."""

from pathlib import Path

import pytest

from balance import gradient_balancers, loss_balancers
from experiments.problems import digits
from experiments.sweeps.job import make_job
from experiments.sweeps.sweep_file import configurations, read_sweep_file

FOLDER = Path(digits.__file__).parent
FILE = read_sweep_file(FOLDER / "methods.yaml")


def test_the_file_has_the_methods_of_the_library_when_it_was_run():
    losses = {entry.loss_method for entry in FILE.configurations.values()}
    gradients = {entry.gradient_method for entry in FILE.configurations.values()} - {None}
    assert losses <= set(loss_balancers.names())
    assert gradients <= set(gradient_balancers.names())
    assert (len(losses), len(gradients)) == (22, 34)


@pytest.mark.filterwarnings("ignore:mgda gives all weight")
@pytest.mark.parametrize("file", ["methods.yaml", "random_weights.yaml"])
def test_every_configuration_can_be_built(file):
    content = read_sweep_file(FOLDER / file)
    for configuration in configurations(content):
        methods = [f"loss_method={configuration.loss_method}", f"gradient_method={configuration.gradient_method}"]
        make_job([f"experiment={content.experiment}", *content.overrides, *methods, *configuration.overrides])


def test_the_random_weights_are_a_search_of_16_runs_with_mean_one():
    made = configurations(read_sweep_file(FOLDER / "random_weights.yaml"))
    weights = [eval(c.overrides[0].partition("=")[2]) for c in made]
    assert len(weights) == 16
    assert all(sum(row) == pytest.approx(4, rel=1e-3) for row in weights)
