import torch

from balance import loss_balancers
from tests.loss.defaults import default_dtype


def test_log_variances_have_the_default_dtype():
    with default_dtype(torch.float64):
        assert {p.dtype for p in loss_balancers.build("uw", num_tasks=2).parameters()} == {torch.float64}
    assert {p.dtype for p in loss_balancers.build("uw", num_tasks=2, init=1.0).parameters()} == {torch.float32}
