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
    # 50-digit solutions; TorchJD without its regularisation
    ("upgrad", {}, "upgrad_exact", 1e-9),
    ("dualproj", {}, "dualproj_exact", 1e-9),
    # TorchJD and LibMTL as published
    ("upgrad", {"reg_eps": 1e-4}, "upgrad_reg1e-4", 1e-9),
    ("dualproj", {"reg_eps": 1e-4}, "dualproj_reg1e-4", 1e-9),
    # 50-digit solutions; TorchJD where its solver converges
    *(("fairgrad", {"alpha": float(alpha)}, f"fairgrad_alpha{alpha}", 1e-9) for alpha in ("0.5", "2", "10")),
    # TorchJD; the official code has K times as much
    *(("aligned_mtl", {"scale_mode": mode}, f"aligned_mtl_{mode}", 1e-9) for mode in ("min", "median", "rmse")),
    # TorchJD's direction; official code
    ("config", {}, "config", 1e-9),
    # TorchJD; the paper's squares
    ("krum", {"distance": "euclidean"}, "krum_byz0_sel1_euclid", 1e-9),
    ("krum", {"distance": "squared"}, "krum_byz0_sel1_squared", 1e-9),
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
    covered = {key for *_, key, _ in GRADIENT} | {"graddrop_fixedU", "trimmed_mean_1"}
    for case, methods in GOLDEN["gradient_methods"].items():
        assert case in CASES
        assert set(methods) <= covered
    assert len(ENTRIES) == 118


@pytest.mark.parametrize(("case", "name", "options", "key", "tolerance"), ENTRIES)
def test_gradient_balancer(case, name, options, key, tolerance):
    expected = GOLDEN["gradient_methods"][case][key]
    J = tensor(GOLDEN["jacobians"][case])
    torch.testing.assert_close(J @ J.T, tensor(GOLDEN["gramians"][case]))
    if "num_tasks" in options:
        options = options | {"num_tasks": len(J)}
    weights = gradient_balancers.build(name, **options)(J @ J.T)
    scale = float(J.norm())
    stored = expected["direction"] if "direction" in expected else (tensor(expected["weights"]) @ J).tolist()
    torch.testing.assert_close(weights @ J, tensor(stored), rtol=tolerance, atol=tolerance * scale)
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
    # the bisector; the projections on it sum to 4 / sqrt(2), or to twice the chosen length / sqrt(2)
    ("config", {}, [[1.0, 0.0], [0.0, 3.0]], [2.0, 2.0]),
    ("config", {"length": "minimum"}, [[1.0, 0.0], [0.0, 3.0]], [1.0, 1.0]),
    ("config", {"length": 1}, [[1.0, 0.0], [0.0, 3.0]], [3.0, 3.0]),
    # cosines in the ratio 1 : 2, and the length 1 / sqrt(5) + 6 / sqrt(5)
    ("config", {"preference": [1.0, 2.0]}, [[1.0, 0.0], [0.0, 3.0]], [1.4, 2.8]),
    # the first gradient is projected to (0.5, 0.5), the second to (0, 1), each with preference 1/2
    ("upgrad", {}, [[1.0, 0.0], [-1.0, 1.0]], [0.25, 0.75]),
    ("upgrad", {"preference": [2.0, 4.0]}, [[1.0, 0.0], [-1.0, 1.0]], [1.0, 5.0]),
    ("dualproj", {"preference": [4.0, 1.0]}, [[1.0, 0.0], [-1.0, 1.0]], [2.0, 2.0]),
    # mean (1/2, 3/2), of length sqrt(5/2); the direction (3, 1) of the min-norm vector has the cosine 0.6 to it
    ("conicgrad", {}, [[1.0, 0.0], [0.0, 3.0]], [1.5, 0.5]),
    # the mean turned by arccos 0.8 towards it
    ("conicgrad", {"c": 0.8}, [[1.0, 0.0], [0.0, 3.0]], [1.3, 0.9]),
    # Gw = w^(-1/2) for orthogonal gradients: w = |g|^(-4/3)
    ("fairgrad", {}, [[1.0, 0.0], [0.0, 8.0]], [1.0, 0.5]),
    # orthogonal gradients scaled to the shortest length, times 1/2
    ("aligned_mtl", {}, [[1.0, 0.0], [0.0, 3.0]], [0.5, 0.5]),
    # no conflict and targets of 0: the sum
    ("gradvac", {}, [[1.0, 0.0], [1.0, 1.0]], [2.0, 1.0]),
    # the first two are nearest to each other
    ("krum", {}, [[0.0, 1.0], [0.0, 2.0], [5.0, 0.0]], [0.0, 1.0]),
    ("krum", {"num_selected": 2}, [[0.0, 1.0], [0.0, 2.0], [5.0, 0.0]], [0.0, 1.5]),
    # of the values 1, 2, 9 and -1, 0, 1 the middle ones remain
    ("trimmed_mean", {}, [[1.0, 0.0], [9.0, -1.0], [2.0, 1.0]], [2.0, 0.0]),
    # similarity 0.6: both gradients get the mean length
    ("sam_gs", {}, [[1.0, 0.0], [0.0, 3.0]], [2.0, 2.0]),
    # similarity 0.8: squares of the gradients over the root of 0.2^2 + 1e-6
    ("sam_gs", {}, [[1.0, 0.0], [0.0, -2.0]], [1 / 0.040001**0.5, -4 / 0.040001**0.5]),
    ("mean", {}, [[1.0, 0.0], [0.0, 3.0]], [0.5, 1.5]),
    ("sum", {}, [[1.0, 0.0], [0.0, 3.0]], [1.0, 3.0]),
    ("random", {}, [[1.0, 3.0]], [1.0, 3.0]),
]


@pytest.mark.parametrize(("name", "options", "rows", "direction"), DIRECTIONS, ids=lambda value: str(value)[:40])
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


@pytest.mark.parametrize("case", [case for case in CASES if "trimmed_mean_1" in GOLDEN["gradient_methods"][case]])
def test_trimmed_mean(case):
    J = tensor(GOLDEN["jacobians"][case])
    direction = gradient_balancers.build("trimmed_mean", trim=1)(J)
    torch.testing.assert_close(direction, tensor(GOLDEN["gradient_methods"][case]["trimmed_mean_1"]["direction"]))


def test_random_weights_are_a_softmax_of_normal_numbers():
    rule = gradient_balancers.build("random", seed=3)
    numbers = torch.randn(2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for step in numbers:
        torch.testing.assert_close(rule(torch.eye(4, dtype=torch.float64)), step.softmax(dim=0))


# LibMTL and TorchJD with ascending orders, J_t = diag(1 + 0.1 t (i + 1)) J of case B. They add 1e-8 to the denominators.
GRADVAC = [
    [1.7777777763543692, 2.307692306286005, 1.5226337446636573],
    [1.4609880250941805, 1.915963675305568, 1.384776763714775],
    [1.263156331432107, 1.6218625003402254, 1.2751658460749282],
    [1.144505431265524, 1.3930954221602074, 1.179994355439047],
]


def test_gradvac_over_four_steps():
    rule = gradient_balancers.build("gradvac", num_tasks=3, order="fixed")
    B = tensor(GOLDEN["jacobians"]["B_K3D3"])
    for t, weights in enumerate(GRADVAC):
        J = (1 + 0.1 * t * torch.arange(1, 4, dtype=torch.float64))[:, None] * B
        torch.testing.assert_close(rule(J @ J.T), tensor(weights), rtol=0, atol=1e-7)
    targets = [[0, -0.429004045573915, 0.2736898320967181], [-0.429004045573915, 0, -0.7670802814513125]]
    torch.testing.assert_close(rule.targets[:2], tensor(targets), rtol=0, atol=1e-9)


def test_imtl_is_safe_of_the_sign_that_the_formula_gets_wrong():
    """The paper's formula gives ascent for all tasks here; by default the direction is turned."""
    J = tensor(GOLDEN["jacobians"]["I_K3_imtl_negative"])
    official = gradient_balancers.build("imtl", official=True)(J @ J.T)
    assert (J @ (official @ J) < 0).all()
    torch.testing.assert_close(gradient_balancers.build("imtl")(J @ J.T), -official)
