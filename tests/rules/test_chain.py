import pytest
import torch
from torch import nn

from balance import Balancer, loss_balancers
from balance.rules.build import build_loss_balancer
from balance.testing import check_loss_balancer
from tests.stage.three_tasks import TASKS, Network


def effective(rule, values):
    values = values.clone().requires_grad_()
    weighted = rule(values)
    return weighted.detach(), torch.autograd.grad(weighted.sum(), values)[0]


def test_rlwlog():
    """K times softmax weights on log losses, as in the IGB code."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    chain = Balancer(3, loss=("scaleinvls", "rlw"), loss_options={"rlw": {"scale": 3.0, "seed": 7}}).loss_balancer.rule
    weights = loss_balancers.build("rlw", scale=3.0, seed=7)(torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(effective(chain, L)[0], weights * L.log())


def test_uwlog():
    """Half of exp(-s) log L + s."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    chain = Balancer(3, loss=["scaleinvls", "uw"], loss_options={"uw": {"init": 0.3}}).loss_balancer.rule.double()
    torch.testing.assert_close(effective(chain, L)[0], 0.5 * (torch.tensor(-0.3).exp() * L.log() + 0.3), rtol=1e-6, atol=1e-6)


def test_dwalog():
    """DWA's weights of the raw epoch means, on log losses."""
    L = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    balancer, dwa = Balancer(3, loss=("scaleinvls", "dwa")), loss_balancers.build("dwa", num_tasks=3)
    for means in (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 1.9, 0.3])):
        balancer.loss_balancer.rule.end_epoch(means)
        dwa.end_epoch(means)
    weights = effective(dwa, torch.ones(3, dtype=torch.float64))[1]
    torch.testing.assert_close(effective(balancer.loss_balancer.rule, L)[0], weights * L.log())
    assert weights.max() > 1.05


def test_a_chain_with_famo_first_observes():
    network = Network()
    balancer = Balancer(TASKS, loss=("famo", "rlw"))
    assert balancer.needs_observation
    balancer.backward(network.losses())
    balancer.observe({t: 0.5 * v.detach() for t, v in network.losses().items()})
    famo = balancer.loss_balancer.rule.rules[0].rule
    assert famo.logits.abs().sum() == 0 or famo.steps.tolist() == [1, 1, 1]


@pytest.mark.parametrize("names", [("scaleinvls", "rlw"), ("scaleinvls", "uw"), ("go4align", "dwa"), ("famo", "rlw")])
def test_chains_keep_the_claims(names):
    claims = ("positive_weights", "separable")
    if "rlw" not in names:
        claims += ("loss_permutation_equivariant",)
    options = {"uw": {"init": -2.0}}
    check_loss_balancer(
        lambda K: Balancer(K, loss=names, loss_options={n: o for n, o in options.items() if n in names}).loss_balancer.rule,
        claims,
        examples=20,
    )


def test_needs_epochs():
    assert Balancer(3, loss=("scaleinvls", "dwa")).loss_balancer.rule.needs_epochs
    assert Balancer(3, loss=("igbv1", "rlw")).loss_balancer.rule.needs_epochs
    assert not Balancer(3, loss=("scaleinvls", "dwa"), loss_options={"dwa": {"mode": "window"}}).loss_balancer.rule.needs_epochs
    assert not Balancer(3, loss=("scaleinvls", "uw")).loss_balancer.rule.needs_epochs


def test_a_chain_of_one_rule_is_that_rule():
    plain, chain = Balancer(3, loss="famo"), Balancer(3, loss=("famo",), loss_options={"famo": {"gamma": 0.5}})
    assert type(chain.loss_balancer.rule) is type(plain.loss_balancer.rule)
    assert chain.loss_balancer.rule.gamma == 0.5
    plain.loss_balancer.rule.logits += 1
    chain.load_state_dict(plain.state_dict())
    assert chain.loss_balancer.rule.logits.tolist() == [1, 1, 1]
    plain.load_state_dict(chain.state_dict())
    assert build_loss_balancer(["ls"], None, 3, 0).rule is build_loss_balancer("ls", None, 3, 0).rule
    with pytest.warns(UserWarning, match="stl switches off"):
        Balancer(3, loss=("stl",), gradient="mgda", loss_options={"stl": {"main_task": 0}})


def test_a_chain_moves_and_counts_as_one_module():
    balancer = Balancer(3, loss=("go4align", "uw"))
    assert isinstance(balancer.loss_balancer.rule, nn.Module)
    assert len(list(balancer.parameters())) == 3
    assert any("cumulative_losses" in key for key in balancer.state_dict())
