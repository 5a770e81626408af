"""Known numbers of the gradient balancers, a row per method; see `tests.references`."""

import pytest
import torch

from balance import gradient_balancers
from balance.gradient.elementwise import drop_signs
from tests.references import GOLDEN, tensor

# method, options, golden name, relative tolerance: 1e-9 where the file gives 12 digits, else what its digits allow
GRADIENT = [
    # reference solver; official projected gradient, LibMTL and TorchJD agree to the accuracy of their solvers
    ("mgda", {}, "mgda", 1e-9),
    # TorchJD with its random orders made ascending; the paper's loop
    ("pcgrad", {"order": "fixed"}, "pcgrad_ascending", 1e-9),
    # closed form of the paper; official code, TorchJD
    ("imtl", {"official": True}, "imtl_g", 1e-9),
    # 50-digit solution of G a = 1/a; official code agrees to 2e-6
    ("nashmtl", {"num_tasks": 0, "max_norm": None}, "nash_mtl", 1e-9),
    # 50-digit solution of the dual, stored with 9 digits; TorchJD to 1e-5, official SLSQP to 1e-4
    *(("cagrad", {"c": float(c), "rescale": 0}, f"cagrad_c{c}", 1e-7) for c in ("0.2", "0.4", "0.5", "1", "2")),
]
CASES = ["A_K2D3", "B_K3D3", "E_K3D2_rank2", "F_K2_opposite", "Z_K2_zero_row", "S_K1", "H_K3_dup", "I_K3_imtl_negative"]
# Every entry of the golden file that belongs to a registered gradient balancer
ENTRIES = [
    pytest.param(case, name, options, key, tolerance, id=f"{case}-{key}")
    for case in CASES
    for name, options, key, tolerance in GRADIENT
    if key in GOLDEN["gradient_methods"][case]
]


def test_no_entry_is_left_out():
    covered = {key for *_, key, _ in GRADIENT} | {"graddrop_fixedU"}
    of_later_methods = ("fairgrad", "aligned_mtl", "upgrad", "dualproj", "config", "krum", "trimmed_mean")
    for case, methods in GOLDEN["gradient_methods"].items():
        assert case in CASES
        assert {key for key in methods if not key.startswith(of_later_methods)} <= covered
    assert len(ENTRIES) == 43


@pytest.mark.parametrize(("case", "name", "options", "key", "tolerance"), ENTRIES)
def test_gradient_balancer(case, name, options, key, tolerance):
    expected = GOLDEN["gradient_methods"][case][key]
    J = tensor(GOLDEN["jacobians"][case])
    torch.testing.assert_close(J @ J.T, tensor(GOLDEN["gramians"][case]))
    if "num_tasks" in options:
        options = options | {"num_tasks": len(J)}
    weights = gradient_balancers.build(name, **options)(J @ J.T)
    scale = float(J.norm())
    torch.testing.assert_close(weights @ J, tensor(expected["direction"]), rtol=tolerance, atol=tolerance * scale)
    unique = expected.get("unique", case != "H_K3_dup" or name != "cagrad")  # equal gradients share their weight in any way
    if unique:
        stored = expected.get("weights", expected.get("total_weights"))
        torch.testing.assert_close(weights, tensor(stored), rtol=tolerance, atol=tolerance * max(1.0, *map(abs, stored)))


# By hand: method, options, Jacobian, direction
DIRECTIONS = [
    # where all signs agree, nothing is dropped
    ("graddrop", {}, [[1.0, 2.0], [3.0, 0.0]], [4.0, 2.0]),
    # where no gradients conflict, the sum
    ("pcgrad", {}, [[1.0, 0.0], [1.0, 1.0]], [2.0, 1.0]),
    # the foot of the perpendicular from 0 on the segment between two gradients
    ("mgda", {}, [[1.0, 0.0], [0.0, 3.0]], [0.9, 0.3]),
    # two gradients: the bisector
    ("imtl", {}, [[1.0, 0.0], [0.0, 3.0]], [0.75, 0.75]),
]


@pytest.mark.parametrize(("name", "options", "rows", "direction"), DIRECTIONS, ids=[row[0] for row in DIRECTIONS])
def test_direction_by_hand(name, options, rows, direction):
    J = tensor(rows)
    rule = gradient_balancers.build(name, num_tasks=len(J), **options)
    actual = rule(J) if gradient_balancers.sees(name) == "jacobian" else rule(J @ J.T) @ J
    torch.testing.assert_close(actual, tensor(direction), rtol=1e-9, atol=1e-12)


# CAGrad, c = 0.4, without rescaling, where 0 is in the convex hull of the gradients, or nearly so. By hand: in all but the last
# problem one task k gains less than all others, so that d = g_0 + 0.4 |g_0| g_k / |g_k|.
CAGRAD_AT_STATIONARY_POINTS = {
    "opposite": ([[2.0], [-1.0]], [0.3]),
    "nearly_opposite": ([[2.0, 1e-4], [-1.0, 1e-4]], [0.5 - 0.2 * 1.00000004**0.5 / 1.00000001**0.5, 1.2e-4]),
    "a_zero_gradient": ([[0.0, 0.0], [4.0, 0.0], [-1.0, 0.5]], [1 - 0.4 * (37 / 45) ** 0.5, 1 / 6 + 0.2 * (37 / 45) ** 0.5]),
    "without_it": ([[4.0, 0.0], [-1.0, 0.5]], [1.5 - 0.6 * (37 / 45) ** 0.5, 0.25 + 0.3 * (37 / 45) ** 0.5]),
    "four_tasks_two_parameters": (
        [[3.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [0.5, 2.0]],
        [0.375 - 0.25 / 2**0.5, 0.5 - 0.25 / 2**0.5],
    ),
    # the mean (0.1, 1/3) projected on the half-line of directions that conflict with no task, at a distance below the radius
    "several_solutions": ([[1.3, 0.0], [-1.0, 0.0], [0.0, 1.0]], [0.0, 1 / 3]),
}


@pytest.mark.parametrize("solver", ["exact", "cvxpy"])
@pytest.mark.parametrize("case", CAGRAD_AT_STATIONARY_POINTS)
def test_cagrad_where_no_direction_helps_every_task(case, solver):
    rows, direction = CAGRAD_AT_STATIONARY_POINTS[case]
    J = tensor(rows)
    weights = gradient_balancers.build("cagrad", rescale=0, solver=solver)(J @ J.T)
    tolerance = 1e-7 if solver == "exact" else 1e-4
    torch.testing.assert_close(weights @ J, tensor(direction), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_graddrop(case):
    expected = GOLDEN["gradient_methods"][case]["graddrop_fixedU"]
    J = tensor(GOLDEN["jacobians"][case])
    direction = drop_signs(J, tensor(expected["U"]), leak=0.0)
    torch.testing.assert_close(direction, tensor(expected["direction_sum"]))
    torch.testing.assert_close(drop_signs(J, tensor(expected["U"]), leak=1.0), J.sum(dim=0))


def test_imtl_is_safe_of_the_sign_that_the_formula_gets_wrong():
    """The paper's formula gives ascent for all tasks here; by default the direction is turned."""
    J = tensor(GOLDEN["jacobians"]["I_K3_imtl_negative"])
    official = gradient_balancers.build("imtl", official=True)(J @ J.T)
    assert (J @ (official @ J) < 0).all()
    torch.testing.assert_close(gradient_balancers.build("imtl")(J @ J.T), -official)
