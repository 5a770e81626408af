import numpy as np
import pytest
import torch

from balance import loss_balancers
from tests.loss.derivatives import effective


def test_rlw_weights_are_a_softmax_with_the_given_sum():
    rule = loss_balancers.build("rlw", scale=3.0)
    weights = torch.stack([effective(rule, torch.ones(3, dtype=torch.float64)) for _ in range(2000)])
    assert weights.sum(dim=1).numpy() == pytest.approx(np.full(2000, 3.0))
    assert weights.mean(dim=0).tolist() == pytest.approx([1, 1, 1], abs=0.05)
