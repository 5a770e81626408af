"""Fixed inputs and known numbers, a row per method. Each source is next to its number, or in the golden file's ``sources``.

The golden file contains numbers solved independently in 40 to 50 digits and compared with the official codes.
"""

import json
from pathlib import Path

import pytest
import torch

from balance import Balancer, gradient_balancers, loss_balancers
from balance.gradient.elementwise import drop_signs
from balance.loss._sac import gaussian_log_density, schedule, tanh_correction
from balance.loss.improvable_gap import reward

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


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


# By hand: method, options, losses, weighted losses of the first step
WEIGHTED_LOSSES = [
    ("stl", {"main_task": 2}, [1.0, 2.0, 4.0], [0.0, 0.0, 4.0]),
    # the weights of the logarithms sum to K, so that a single task has weight 1
    ("igbv2", {}, [4.0], [2 * 0.6931471805599453]),
]


@pytest.mark.parametrize(("name", "options", "row", "weighted"), WEIGHTED_LOSSES, ids=[row[0] for row in WEIGHTED_LOSSES])
def test_weighted_losses_by_hand(name, options, row, weighted):
    rule = loss_balancers.build(name, num_tasks=len(row), **options)
    close(rule(tensor(row)), weighted)


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


def run_losses(rule, rows, observing=False, epochs=False):
    """Derivatives and values of the weighted losses at rows 0 to 5."""
    derivatives, totals = [], []
    for t, row in enumerate(rows[:6]):
        losses = tensor(row).requires_grad_()
        weighted = rule(losses)
        derivatives.append(torch.autograd.grad(weighted.sum(), losses)[0])
        totals.append(weighted.sum().item())
        if observing:
            rule.observe(tensor(rows[t + 1]))
        if epochs:
            rule.end_epoch(tensor(row))
    return torch.stack(derivatives), totals


def close(actual, expected):
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-9, atol=1e-12)


@pytest.fixture
def rows(golden):
    return golden["loss_methods"]["losses_rows_0_to_6"]


@pytest.fixture
def sequences(golden):
    return golden["loss_methods"]["methods"]


@pytest.mark.parametrize(("name", "key"), [("ls", "ls"), ("scaleinvls", "si")])
def test_stateless_loss_balancer(rows, sequences, name, key):
    derivatives, totals = run_losses(loss_balancers.build(name), rows)
    close(derivatives, [step["dloss"] for step in sequences[key]])
    if name == "scaleinvls":
        assert totals == pytest.approx([step["loss"] for step in sequences[key]], rel=1e-9)


def test_stl(rows):
    derivatives, _ = run_losses(loss_balancers.build("stl", num_tasks=3, main_task=1), rows)
    close(derivatives, [[0.0, 1.0, 0.0]] * 6)  # by definition


def test_rlw():
    # softmax of standard normal numbers, by hand from the same generator
    z = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weighted = loss_balancers.build("rlw", seed=7, scale=3.0)(tensor([1.0, 2.0, 4.0]))
    close(weighted, (3 * z.exp() / z.exp().sum() * tensor([1.0, 2.0, 4.0])).tolist())


def test_dwa_by_epochs(rows, sequences):
    derivatives, _ = run_losses(loss_balancers.build("dwa", num_tasks=3), rows, epochs=True)
    close(derivatives, [step["weights_sumK"] for step in sequences["dwa_epoch_T2_row_is_epoch_mean"]])


def test_dwa_by_window(rows, sequences):
    derivatives, _ = run_losses(loss_balancers.build("dwa", num_tasks=3, mode="window", window=2), rows)
    close(derivatives, [step["weights_sumK"] for step in sequences["dwa_window2_T2_official"]])


def test_dwa_window_starts_when_it_is_full(rows, sequences):
    """The official code counts placeholders of one as losses until step 2W; from there on both agree."""
    derivatives, _ = run_losses(loss_balancers.build("dwa", num_tasks=3, mode="window", window=3), rows)
    official = [step["weights_sumK"] for step in sequences["dwa_window3_T2_official_with_placeholder_ones"]]
    close(derivatives[:5], [[1.0] * 3] * 5)
    close(derivatives[5], official[5])
    assert official[4] != [1.0] * 3


@pytest.mark.parametrize("key", ["uw_init0_sgd_lr0.025", "uw_init-0.5_sgd_lr0.025"])
def test_uw(rows, sequences, key):
    rule = loss_balancers.build("uw", num_tasks=3, init=-0.5 if "-0.5" in key else 0.0).double()
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.025)
    for row, step in zip(rows[:6], sequences[key]["steps"], strict=False):
        losses = tensor(row).requires_grad_()
        close(torch.stack(list(rule.log_variances)).detach(), step["s"])
        optimizer.zero_grad()
        total = rule(losses).sum()
        total.backward()
        assert total.item() == pytest.approx(step["loss"], rel=1e-9)
        close(losses.grad, step["dloss"])
        close(torch.stack([s.grad for s in rule.log_variances]), step["ds"])
        optimizer.step()


@pytest.mark.parametrize(("key", "gamma"), [("famo_lr0.025_gamma0.001", 1e-3), ("famo_lr0.025_gamma0", 0.0)])
def test_famo(rows, sequences, key, gamma):
    rule = loss_balancers.build("famo", num_tasks=3, gamma=gamma)
    for t, step in enumerate(sequences[key]):
        losses = tensor(rows[t]).requires_grad_()
        close(rule.logits, step["logits"])
        total = rule(losses).sum()
        assert total.item() == pytest.approx(step["loss"], rel=1e-9)
        close(torch.autograd.grad(total, losses)[0], step["dloss"])
        rule.observe(tensor(rows[t + 1]))
        close(rule.logits, step["logits_after"])


GO4ALIGN = [  # number of groups, step size, scale of the indicators, factor from that scale to ours (K times the paper's)
    (1, 1e-4, "code", 1),
    (2, 1e-4, "code", 1),
    (3, 1e-4, "code", 1),
    (1, 0.1, "code", 1),
    (2, 1e-4, "paper", 3),
    (2, 0.1, "paper", 3),
]


@pytest.mark.parametrize(("num_groups", "step_size", "scale", "factor"), GO4ALIGN)
def test_go4align(rows, sequences, num_groups, step_size, scale, factor):
    beta = {1e-4: "0.0001", 0.1: "0.1"}[step_size]
    steps = sequences[f"go4align_{scale}_scale_beta{beta}_groups{num_groups}_exact_kmeans"]
    rule = loss_balancers.build("go4align", num_tasks=3, num_groups=num_groups, step_size=step_size)
    derivatives, totals = run_losses(rule, rows)
    close(derivatives, (factor * tensor([step["weights"] for step in steps])).tolist())
    assert totals == pytest.approx([factor * step["loss"] for step in steps], rel=1e-9)


def test_igbv1(rows, sequences):
    rule = loss_balancers.build("igbv1", num_tasks=3)
    for t, step in enumerate(sequences["igbv1_base_row1_active_from_step2"]):
        losses = tensor(rows[t]).requires_grad_()
        weighted = rule(losses)
        close(weighted.detach(), step["weighted"])
        close(torch.autograd.grad(weighted.sum(), losses)[0], step["dloss"])
        rule.end_epoch(tensor(rows[t]))  # each row is an epoch of one step; the base is row 1


def test_igbv2_pieces(golden):
    pieces = golden["igbv2_pieces"]
    noise, log_deviation = tensor(pieces["noise"]), tensor(pieces["log_std"])
    u = tensor(pieces["mu"]) + log_deviation.exp() * noise
    torch.testing.assert_close(u, tensor(pieces["u"]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(3 * u.softmax(dim=0), tensor(pieces["action_K_softmax"]), rtol=1e-9, atol=1e-11)
    density = gaussian_log_density(noise, log_deviation)
    assert density.item() == pytest.approx(pieces["gaussian_logprob"], rel=1e-9)
    official = density - tanh_correction(u)
    assert official.item() == pytest.approx(pieces["official_logprob_with_tanh_correction"], rel=1e-9)
    for fill, updates in pieces["updates_per_trigger_vs_buffer_fill"].items():
        assert schedule(float(fill)) == (updates, pieces["batch_vs_buffer_fill"][fill])
    example = pieces["reward_example"]
    value = reward(tensor(example["prev"]), tensor(example["cur"]), tensor(example["base"]))
    assert value == pytest.approx(example["reward"], rel=1e-9)


# loss balancer, gradient balancer, options, scale: K times mgda or cagrad as in the official code is scale="sum" or a factor
COMPOSITIONS = [
    (f"{short}+{key}", loss, gradient, options)
    for short, loss in (("ls", "ls"), ("si", "scaleinvls"), ("igbv1", "igbv1"), ("uw", "uw"))
    for key, gradient, options in (
        ("ls", None, {}),
        ("mgda", "mgda", {}),
        ("cagrad", "cagrad", {}),
        ("imtl", "imtl", {}),
        ("nashmtl", "nashmtl", {"max_norm": None}),
    )
]


@pytest.mark.filterwarnings("ignore:nashmtl ignores positive loss weights")
@pytest.mark.parametrize(("key", "loss", "gradient", "options"), COMPOSITIONS, ids=[row[0] for row in COMPOSITIONS])
def test_composition(golden, rows, key, loss, gradient, options):
    """Losses row2 + J theta + head_i at theta = 0, head = 0: shared gradient, head factors, gradient of UW's parameters."""
    expected = golden["compositions"]["results"][key]
    J = tensor(golden["jacobians"]["B_K3D3"])
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    heads = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    scale = "sum" if gradient == "mgda" else "paper"
    balancer = Balancer(3, loss=loss, gradient=gradient, scale=scale, gradient_options=options).double()
    if loss == "uw":
        with torch.no_grad():
            for s, value in zip(balancer.loss_balancer.rule.log_variances, [0.1, -0.2, 0.3], strict=True):
                s.fill_(value)
    if loss == "igbv1":
        for row in rows[:2]:
            balancer.loss_balancer.rule.end_epoch(tensor(row))
    losses = {str(k): rows[2][k] + J[k] @ theta + heads[k] for k in range(3)}
    balancer.backward(losses, shared=[theta])
    factor = 3 if gradient == "cagrad" else 1  # the official code multiplies CAGrad's direction by K
    torch.testing.assert_close(factor * theta.grad, tensor(expected["shared_grad"]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(torch.stack([h.grad for h in heads]), tensor(expected["head_grad_scale"]), rtol=1e-8, atol=1e-9)
    if loss == "uw":  # the plain sum, whatever the gradient balancer; the official code multiplies by its weights
        plain = 0.5 * (1 - (-tensor([0.1, -0.2, 0.3])).exp() * tensor(rows[2]))
        torch.testing.assert_close(torch.stack([s.grad for s in balancer.loss_balancer.rule.log_variances]), plain)


LOG_CASES = sorted(GOLDEN["log_variants"]["cases"])


def generated(K, D):
    """The Jacobian of a case that the file names by its size, by the file's formula."""
    return tensor(
        [[(i + 1) * (((3 * i * i + 5 * k * k + 7 * i * k + 2 * i + k + 1) % 11) - 5) for k in range(D)] for i in range(K)]
    )


@pytest.mark.parametrize("case", LOG_CASES)
def test_log_variants(case):
    """The official log_mgda, log_imtl and log_cagrad are scaleinvls followed by the gradient balancer."""
    expected = GOLDEN["log_variants"]["cases"][case]
    K, D = (int(part) for part in case.split("_K")[1].split("D"))
    J = generated(K, D)
    if case in GOLDEN["jacobians"]:
        torch.testing.assert_close(J, tensor(GOLDEN["jacobians"][case]))

    def step(gradient, **options):
        theta = torch.zeros(D, dtype=torch.float64, requires_grad=True)
        losses = tensor(expected["losses"]) + J @ theta
        balancer = Balancer(K, loss="scaleinvls", gradient=gradient, gradient_options=options)
        return balancer.backward(losses, shared=[theta]), theta.grad

    report, direction = step("mgda")
    effective = report.gradient_weights * report.loss_weights
    wanted = expected["log_mgda"]
    torch.testing.assert_close(report.gradient_weights, tensor(wanted["simplex_w_on_log_gradients"]), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(effective / effective.sum(), tensor(wanted["effective_weights"]), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(direction / effective.sum(), tensor(wanted["direction"]), rtol=1e-8, atol=1e-8)

    wanted = expected["log_imtl"]
    report, direction = step("imtl", official=True)
    torch.testing.assert_close(report.gradient_weights, tensor(wanted["alpha_on_log_gradients"]), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(direction, tensor(wanted["direction"]), rtol=1e-8, atol=1e-8)

    wanted = expected["log_cagrad_c0.4"]
    report, direction = step("cagrad", c=0.4)
    torch.testing.assert_close(K * direction, tensor(wanted["shared_grad_rescale1_timesK"]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(report.loss_weights, tensor(wanted["head_weights"]), rtol=1e-8, atol=1e-9)
