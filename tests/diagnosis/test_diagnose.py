import pytest
import torch

import balance
from tests.diagnosis.problems import NONE, Quadratics

QUADRATICS = Quadratics(a=[1.0], b=[2.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"batches": []},
            ValueError,
            "batches must contain at least two, .* got 0. If it is an iterator that was used up, give",
        ),
        ({"batches": [1.0]}, ValueError, "batches must contain at least two, .* but got 1"),
        ({"batches": 3}, TypeError, "batches must be an iterable of batches, but got int"),
        ({"losses": {"a": 1}}, TypeError, "losses must be a callable, .* but got dict"),
        ({"losses": lambda batch: QUADRATICS.theta * batch}, TypeError, "losses must return a dict .* but got Tensor"),
        ({"losses": lambda batch: {"a": QUADRATICS.theta}}, ValueError, r"at least two tasks, but got \['a'\]"),
        ({"losses": lambda batch: {"a": 1.0, "b": QUADRATICS.theta}}, TypeError, "Loss of task 'a' must be a tensor"),
        ({"losses": lambda batch: {"a": torch.ones(2), "b": QUADRATICS.theta}}, ValueError, "must be a scalar"),
        (
            {"losses": lambda batch: {"a": QUADRATICS.theta, "b": QUADRATICS.theta} if batch < 2 else {"b": QUADRATICS.theta}},
            ValueError,
            "for batch 1 'a' are missing",
        ),
        ({"losses": lambda batch: {"a": QUADRATICS.theta / 0, "b": QUADRATICS.theta}}, ValueError, "Losses must be finite"),
        ({"model": QUADRATICS.theta}, TypeError, "model must be an nn.Module, but got Parameter"),
        ({"shared": []}, ValueError, "shared must hold parameters, but is empty"),
        ({"shared": QUADRATICS}, TypeError, "shared must be an iterable of parameters"),
        ({"shared": [torch.zeros(2)]}, ValueError, "requires a gradient, but all are frozen"),
        ({"loss_methods": ("uww",)}, ValueError, "Unknown loss balancer 'uww'. Did you mean 'uw'?"),
        ({"gradient_methods": ("mdga",)}, ValueError, "Unknown gradient balancer 'mdga'. Did you mean 'mgda'?"),
        ({"gradient_methods": "mgda"}, TypeError, r"several names, but got 'mgda'. Use \('mgda',\)"),
        ({"steps": 0}, ValueError, "steps must be an int, at least 1, but got 0"),
        ({"num_batches": 1}, ValueError, "num_batches must be an int, at least 2, but got 1"),
        ({"lr": 0.0}, ValueError, "lr must be positive, but got 0.0"),
    ],
)
def test_mistakes(change, error, message):
    arguments = {"losses": QUADRATICS.losses, "batches": [1.0, 2.0], "model": QUADRATICS, "shared": [QUADRATICS.theta], **NONE}
    arguments |= change
    with pytest.raises(error, match=message):
        balance.diagnose(arguments.pop("losses"), arguments.pop("batches"), **arguments)
    assert QUADRATICS.theta.tolist() == [0]
    assert QUADRATICS.theta.grad is None
