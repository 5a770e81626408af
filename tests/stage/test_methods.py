import pytest
import torch

import balance
from balance.stage.methods import methods_of


def test_methods_of_a_balancer_have_their_defaults():
    methods = balance.Balancer(("a", "b"), "stl", "cagrad", loss_options={"main_task": 1}).methods
    defaults = {"gradient.c": 0.4, "gradient.rescale": "paper", "gradient.solver": "exact"}
    assert methods == ("stl", "cagrad", {"loss.main_task": 1} | defaults)
    assert methods_of("ls", None, "cagrad", {"c": 0.9}).options == defaults | {"gradient.c": 0.9}


def test_methods_of_a_chain_and_of_callables():
    every = balance.compose.every(2, "cagrad", 3, c=0.9)
    loss, gradient, options = methods_of(["dwa", "linear_schedule"], {"dwa": {"temperature": 3.0}}, every, None)
    assert loss == "dwa+linear_schedule"
    assert gradient == repr(every)
    assert options["loss.dwa.temperature"] == 3.0
    assert all(key.startswith(("loss.dwa.", "loss.linear_schedule.")) for key in options)
    assert methods_of(torch.log, None, None, None).options == {}


@pytest.mark.parametrize("name", ["pcgrad", "graddrop"])
def test_the_seed_is_no_option(name):
    assert "seed" in balance.gradient_balancers.options(name)
    assert "gradient.seed" not in methods_of("ls", None, name, None).options
