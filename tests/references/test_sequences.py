"""Known numbers of the gradient balancers with state, step by step; see `tests.references`.

The file contains sequences computed independently in float64, and compared with LibMTL to 4e-15 and, where it has the method,
with TorchJD 0.18.
"""

import json
import math
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
    """The file's logits and weights belong to the step, not to the state after it."""
    gradnorm, excess = (gradient_balancers.build(name, num_tasks=3) for name in ("gradnorm", "excess_mtl"))
    for step, (learned, weighted) in enumerate(zip(SEQUENCES["gradnorm"], SEQUENCES["excess_mtl"], strict=True)):
        J = jacobian(step)
        before = gradnorm.logits.clone()
        torch.testing.assert_close(before, tensor(learned["s"]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradnorm(J @ J.T, losses=tensor(rows[step])), tensor(learned["w"]), rtol=1e-9, atol=0)
        torch.testing.assert_close((before - gradnorm.logits) / 0.025, tensor(learned["ds"]), rtol=1e-9, atol=1e-9)
        excess(J)
        torch.testing.assert_close(3 * excess.log_weights.softmax(dim=0), tensor(weighted["w"]), rtol=1e-9, atol=0)


# From the authors' package conflictfree 0.1.8, PseudoMomentumOperator, run in float64: three steps of all tasks, then three
# steps of one task each, in turn
CONFIG_MOMENTUM = [
    [0.9999999967642, 0.9999999984208, -0.9999999966105],
    [-0.5919647752311, 0.9811107420602, 0.5249497536439],
    [-0.7853153705913, 0.9414809121309, 0.7326789236776],
    [-0.8508019375082, 0.9647087545872, 0.8082918499731],
    [-0.8751352996369, 0.9809999298262, 0.8603149524025],
    [-0.8528749989199, 0.9374455875111, 0.7876258488129],
]


def test_config_momentum():
    J = tensor(GOLDEN["jacobians"]["B_K3D3"])
    rule = gradient_balancers.build("config_momentum", num_tasks=3)
    for step, expected in enumerate(CONFIG_MOMENTUM):
        gradients = J + 3 * step * J.roll(1, dims=1)
        present = None if step < 3 else torch.tensor([step % 3])
        direction = rule(gradients if present is None else gradients[present], present=present)
        torch.testing.assert_close(direction, tensor(expected), rtol=1e-9, atol=1e-11)


# From TorchJD 0.18, PCD(eps=0), on the Jacobians of the file: options, directions of three steps
PCD = [
    (
        {},
        [
            [-3.64193778290726, 4.27060769718215, -2.12089582068548],
            [-3.98392376146653, 4.71198265952701, -2.34212956070733],
            [-4.33171261365203, 5.14967721011433, -2.56068164057093],
        ],
    ),
    (
        {"tau": 0.3, "beta": 0.5},
        [
            [0.785966996165616, 5.37560549691997, -2.54659015595801],
            [0.97334158473045, 5.89391553037401, -2.80613005405139],
            [1.09646788588036, 6.42398134275938, -3.06108181581487],
        ],
    ),
]


@pytest.mark.parametrize(("options", "directions"), PCD, ids=["default", "tau"])
@pytest.mark.parametrize("primary", [0, 2])
def test_pcd(options, directions, primary):
    order = [0, 1, 2] if primary == 0 else [1, 2, 0]  # the tasks, with the first task at place ``primary``
    rule = gradient_balancers.build("pcd", num_tasks=3, primary=primary, **options)
    for step, expected in enumerate(directions):
        J = jacobian(step)[order]
        torch.testing.assert_close(rule(J @ J.T) @ J, tensor(expected), rtol=1e-9, atol=1e-10)


LN2 = math.log(2)
M = (0.8 * 2**0.5 - 1) / (2**0.5 - 1)
# By hand: method, options, Jacobians and losses of the steps, weights of the last step
BY_HAND = [
    # lengths 1, 3, then 3, 1: 1 -> (1 + 4) / 2 and (1 + 4/3) / 2 -> the mean with 4/3 and 4
    ("inverse_norm", {"beta": 0.5}, [([[1, 0], [0, 3]], None), ([[3, 0], [0, 1]], None)], [23 / 12, 31 / 12]),
    # average lengths (0.5 + 3) / 1.5 and (1.5 + 1) / 1.5, shares 1/4 and 3/4 of 2
    (
        "ema_norm",
        {"decay": 0.5, "total_norm": 2.0, "shares": [1.0, 3.0]},
        [([[1, 0], [0, 3]], None), ([[3, 0], [0, 1]], None)],
        [3 / 14, 9 / 10],
    ),
    # t = G / 4L = 1, 9/4
    ("ntk", {}, [([[2, 0], [0, 6]], [1, 4])], [13 / 4, 13 / 9]),
    # its square root, as in PhysicsNeMo-Sym: 1, 3/2
    ("ntk", {"estimate": "root"}, [([[2, 0], [0, 6]], [1, 4])], [5 / 2, 5 / 3]),
    # N^2 t = 4, 9/4
    ("ntk", {"residuals": [2, 1]}, [([[2, 0], [0, 6]], [1, 4])], [25 / 16, 25 / 9]),
    # mgda's weights are 0.9, 0.1, then 0.1, 0.9
    ("cr_mogm", {}, [([[1, 0], [0, 3]], None), ([[3, 0], [0, 1]], None)], [0.82, 0.18]),
    ("cr_mogm", {"initial": [0.5, 0.5], "alpha": 0.5}, [([[1, 0], [0, 3]], None)], [0.7, 0.3]),
    (
        "cr_mogm",
        {"alpha": 0.0, "sigma": 0.5},
        [([[1, 0], [0, 3]], None), ([[3, 0], [0, 1]], None)],
        [0.9 - 0.8 / 2**0.5, 0.1 + 0.8 / 2**0.5],
    ),
    # shares 1/5, 4/5: only the second loss falls
    ("epo", {}, [([[1, 0], [0, 1]], [1, 4])], [0, 1]),
    # the same shares by the preference
    ("epo", {"preference": [1.0, 4.0]}, [([[1, 0], [0, 1]], [3, 3])], [0, 1]),
    # shares 1/3, 2/3: the first loss may rise by ln 2, no more
    ("epo", {}, [([[1, 0], [-1, 1]], [1, 2])], [(1 - LN2) / 2, (1 + LN2) / 2]),
    # on the ray: the steepest descent of the sum, which is the second gradient
    ("epo", {}, [([[1, 0], [0, 2]], [1, 1])], [0, 1]),
    # on the ray, gradients in conflict: Gw >= 0 for weights of 1/3..1/2 of the second, and the sum falls fastest at 1/2
    ("epo", {}, [([[1, 0], [-1, 1]], [1, 1])], [1 / 2, 1 / 2]),
    # off the ray: (-M/sqrt 2, 1 - M + M/sqrt 2) has the least part M of the gradient of h that turns it by 0.8
    ("pmgda", {}, [([[1, 0], [0, 1]], [1, 3])], [-M / 2**0.5, 1 - M + M / 2**0.5]),
    # near the ray: both parts along it are (0.8, 0.4)
    ("pmgda", {}, [([[1, 0], [0, 2]], [1, 1.005])], [0.8, 0.2]),
    # on the ray: mgda
    ("pmgda", {}, [([[1, 0], [0, 3]], [1, 1])], [0.9, 0.1]),
]


@pytest.mark.parametrize(("name", "options", "steps", "weights"), BY_HAND)
def test_weights_by_hand(name, options, steps, weights):
    rule = gradient_balancers.build(name, num_tasks=2, **options)
    for gradients, losses in steps:
        J = tensor(gradients)
        actual = rule(J @ J.T) if losses is None else rule(J @ J.T, losses=tensor(losses))
    torch.testing.assert_close(actual, tensor(weights), rtol=1e-9, atol=1e-12)


def test_lr_annealing_by_hand():
    """The greatest entry of the main gradient is 4, the means of the other are 1 and 2: 1 -> (1 + 4) / 2 -> (5/2 + 2) / 2."""
    rule = gradient_balancers.build("lr_annealing", num_tasks=2, main_task=1, beta=0.5)
    assert rule(tensor([[1, 1], [-4, 0]])).tolist() == [-1.5, 2.5]
    assert rule(tensor([[3, -1], [-4, 0]])).tolist() == [2.75, -2.25]


def test_moco_of_the_paper_by_hand():
    """Averages (1, 0) and (0, 2), then (0.75, 0) and (0, 3); the weights move by half of the rate times the squares."""
    rule = gradient_balancers.build(
        "moco", num_tasks=2, normalization="none", beta=0.5, beta_sigma=0.0, gamma=0.1, gamma_sigma=0.0
    )
    torch.testing.assert_close(rule(tensor([[2, 0], [0, 4]])), tensor([0.575, 0.85]))
    w = 0.575 + (-0.1 * 0.575 * 0.5625 + 0.1 * 0.425 * 9) / 2
    torch.testing.assert_close(rule(tensor([[0.5, 0], [0, 4]])), tensor([0.75 * w, 3 * (1 - w)]))
