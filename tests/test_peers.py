"""Every method of TorchJD 0.18, of LibMTL and of the seven code bases has a name here, or a reason to be left out."""

import pytest

from balance import Balancer, gradient_balancers, loss_balancers
from tests.peers import PEERS

PAIRS = [
    pytest.param(*here, id=f"{peer}-{name}")
    for peer, methods in PEERS.items()
    for name, here in methods.items()
    if not isinstance(here, str)
]


def test_the_lists_are_whole():
    assert [len(PEERS[peer]) for peer in ("TorchJD", "LibMTL")] == [35, 26]
    assert {name for methods in PEERS.values() for name, here in methods.items() if isinstance(here, str)} == {
        "MOML",
        "FORUM",
        "AutoLambda",
    }


@pytest.mark.parametrize(("loss", "gradient"), PAIRS)
def test_every_method_of_a_peer_can_be_built(loss, gradient):
    for name in [loss] if isinstance(loss, str) else loss or ():
        assert name in loss_balancers
    assert gradient is None or gradient in gradient_balancers
    Balancer(4, loss=loss or "ls", gradient=gradient)
