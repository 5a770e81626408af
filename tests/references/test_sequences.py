"""Known numbers of the gradient balancers with state, step by step; see `tests.references`.

The file contains sequences computed independently in float64, and compared with LibMTL to 4e-15 and, where it has the method,
with TorchJD 0.18.
"""

import json
from pathlib import Path

import pytest
import torch

from balance import gradient_balancers
from balance.rules.protocol import takes
from tests.references import GOLDEN, tensor

SEQUENCES = json.loads((Path(__file__).parents[1] / "golden_sequences.json").read_text(encoding="utf-8"))["sequences"]

# method, options that make it LibMTL's, entry of the file
METHODS = [
    ("moco", {"official": True}, "moco"),
    ("db_mtl", {"epsilon": 1e-8}, "db_mtl"),
    ("excess_mtl", {}, "excess_mtl"),
    ("sdmgrad", {}, "sdmgrad"),
    ("modo", {}, "modo"),
    ("gradnorm", {}, "gradnorm"),
]

# state after a step: attribute, entry of the file
STATES = {"moco": {"weights": "lam"}, "sdmgrad": {"weights": "w"}, "modo": {"weights": "lam"}}


def jacobian(step):
    """Return the Jacobian of a step: every task's gradient grows at its own rate."""
    return tensor([[1 + 0.1 * step * (task + 1)] for task in range(3)]) * tensor(GOLDEN["jacobians"]["B_K3D3"])


@pytest.mark.parametrize(("name", "options", "key"), METHODS, ids=[row[0] for row in METHODS])
def test_sequence(rows, name, options, key):
    rule = gradient_balancers.build(name, num_tasks=3, **options)
    for step, expected in enumerate(SEQUENCES[key]):
        J = jacobian(step)
        keywords = {"losses": tensor(rows[step])} if takes(rule, "losses") else {}
        direction = rule(J, **keywords) if gradient_balancers.sees(name) == "jacobian" else rule(J @ J.T, **keywords) @ J
        torch.testing.assert_close(direction, tensor(expected["d"]), rtol=1e-9, atol=1e-11)
        for state, of_file in STATES.get(name, {}).items():
            torch.testing.assert_close(getattr(rule, state), tensor(expected[of_file]), rtol=1e-9, atol=1e-11)


def test_state_of_gradnorm_before_each_step_and_excess_weights(rows):
    """The logits and the weights of the file, which are those of the step and not of the state after it."""
    gradnorm, excess = (gradient_balancers.build(name, num_tasks=3) for name in ("gradnorm", "excess_mtl"))
    for step, (learned, weighted) in enumerate(zip(SEQUENCES["gradnorm"], SEQUENCES["excess_mtl"], strict=True)):
        J = jacobian(step)
        before = gradnorm.logits.clone()
        torch.testing.assert_close(before, tensor(learned["s"]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradnorm(J @ J.T, losses=tensor(rows[step])), tensor(learned["w"]), rtol=1e-9, atol=0)
        torch.testing.assert_close((before - gradnorm.logits) / 0.025, tensor(learned["ds"]), rtol=1e-9, atol=1e-9)
        excess(J)
        torch.testing.assert_close(3 * excess.log_weights.softmax(dim=0), tensor(weighted["w"]), rtol=1e-9, atol=0)
