"""Properties that other libraries test on matrices of every rank: checked here on the way from gradients to a direction.

The Gramian is computed in float64 from gradients in float32 or float64. The weights are applied in the dtype of the gradients,
as the stage does. A rank below the number of tasks is exact up to rounding only. So 0 can be in the convex hull of the
gradients, or very near to it.
"""

import pytest
import torch

from balance import gradient_balancers

SHAPES = [(1, 1), (1, 5), (2, 1), (2, 2), (2, 9), (3, 2), (4, 9), (5, 50), (7, 3), (9, 4), (9, 30)]
FAST = [(1e-10, torch.float32), (1e10, torch.float64)]
CASES = [
    pytest.param(scale, dtype, marks=[] if (scale, dtype) in FAST else pytest.mark.slow)
    for scale in (1e-10, 1.0, 1e10)
    for dtype in (torch.float32, torch.float64)
]

NEVER_CONFLICTS = [
    ("mgda", {}),
    ("nashmtl", {}),
    ("nashmtl", {"max_norm": None}),
    ("cagrad", {"c": 1.0}),
    ("cagrad", {"c": 1.0, "rescale": 0}),
    ("cagrad", {"c": 3.0}),
    ("upgrad", {}),
    ("dualproj", {}),
    ("fairgrad", {}),
    ("fairgrad", {"alpha": 0.5}),
]
DETERMINISTIC = [
    *NEVER_CONFLICTS,
    ("cagrad", {}),
    ("cagrad", {"c": 0.9}),
    ("imtl", {}),
    ("imtl", {"official": True}),
    ("config", {}),
    ("conicgrad", {}),
    ("aligned_mtl", {"scale_mode": "rmse"}),
]
SCALES_WITH_GRADIENTS = [
    ("mgda", {}),
    ("cagrad", {}),
    ("cagrad", {"c": 1.0}),
    ("imtl", {}),
    ("pcgrad", {}),
    ("upgrad", {}),
    ("dualproj", {}),
    ("config", {}),
    ("conicgrad", {}),
    ("aligned_mtl", {}),
    ("krum", {}),
]
LINEAR = [
    ("pcgrad", {"order": "fixed"}),
    ("gradvac", {"order": "fixed"}),
    ("graddrop", {"leak": 1.0}),
    ("cagrad", {"c": 0.0}),
    ("upgrad", {}),
    ("config", {}),
    ("mean", {}),
]
# Rules whose direction can be much longer, or shorter, than the gradients
OTHER_LENGTH = {
    "config_momentum",
    "ema_norm",
    "fairgrad",
    "inverse_norm",
    "lr_annealing",
    "moco",
    "nashmtl",
    "ntk",
    "sam_gs",
}


def matrix(num_tasks, num_parameters, rank, generator):
    """Return a matrix of a given rank: random singular vectors, and singular values between 1/2 and 2."""
    left = torch.linalg.qr(torch.randn(num_tasks, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(num_parameters, rank, generator=generator, dtype=torch.float64)).Q
    values = 2 ** (2 * torch.rand(rank, generator=generator, dtype=torch.float64) - 1)
    return left * values @ right.T


def matrices(scale, dtype, zero_rows=True):
    """Yield matrices of every shape and rank; every third with a zero row, every fourth with rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    number = 0
    for num_tasks, num_parameters in SHAPES:
        for rank in range(1, min(num_tasks, num_parameters) + 1):
            for _ in range(3):
                J = scale * matrix(num_tasks, num_parameters, rank, generator)
                number += 1
                if zero_rows and number % 3 == 0:
                    J[torch.randint(num_tasks, (), generator=generator)] = 0
                if number % 4 == 0:
                    J *= 10 ** (4 * torch.rand(num_tasks, 1, generator=generator, dtype=torch.float64) - 2)
                yield J.to(dtype)


def build(name, num_tasks, options):
    return gradient_balancers.build(name, num_tasks=num_tasks, **options)


def direction(name, J, options):
    """Return the direction and the length that it would have if the weighted gradients did not cancel each other."""
    rule = build(name, len(J), options)
    if gradient_balancers.sees(name) == "jacobian":
        return rule(J), J.norm(dim=1).sum()
    weights = rule(J.double() @ J.double().T).to(J.dtype)
    return weights @ J, weights.abs() @ J.norm(dim=1)


def digits(dtype, loose):
    """Return a relative tolerance: a multiple of the rounding of a sum of a few gradients."""
    return loose * torch.finfo(dtype).eps


@pytest.mark.parametrize(("scale", "dtype"), CASES)
@pytest.mark.parametrize("name", gradient_balancers.names())
def test_direction_is_finite_and_a_combination_of_the_gradients(name, scale, dtype):
    for J in matrices(scale, dtype):
        d, size = direction(name, J, {})
        assert d.shape == J.shape[1:]
        assert d.dtype == dtype
        assert d.isfinite().all()
        assert d.norm() <= size * (1 + digits(dtype, 10)) or name in OTHER_LENGTH
        assert size <= 1e4 * J.norm(dim=1).sum() or name in OTHER_LENGTH


@pytest.mark.parametrize(("scale", "dtype"), CASES)
@pytest.mark.parametrize(("name", "options"), NEVER_CONFLICTS)
def test_direction_never_conflicts(name, options, scale, dtype):
    for J in matrices(scale, dtype):
        d, size = direction(name, J, options)
        assert (J @ d >= -digits(dtype, 50) * J.norm(dim=1) * size).all()


@pytest.mark.parametrize(("scale", "dtype"), CASES)
def test_imtl_never_conflicts_where_gradients_are_independent(scale, dtype):
    for J in matrices(scale, dtype, zero_rows=False):
        if torch.linalg.matrix_rank(J / J.norm(dim=1, keepdim=True), rtol=1e-3) == len(J):
            d, size = direction("imtl", J, {})
            assert (J @ d >= -digits(dtype, 50) * J.norm(dim=1) * size).all()


@pytest.mark.parametrize(("scale", "dtype"), CASES)
@pytest.mark.parametrize(("name", "options"), DETERMINISTIC)
def test_direction_does_not_depend_on_the_order_of_the_tasks(name, options, scale, dtype):
    generator = torch.Generator().manual_seed(1)
    for J in matrices(scale, dtype):
        d, size = direction(name, J, options)
        permuted, _ = direction(name, J[torch.randperm(len(J), generator=generator)], options)
        assert (permuted - d).norm() <= max(1e-7, digits(dtype, 20)) * size


@pytest.mark.parametrize(("scale", "dtype"), CASES)
def test_graddrop_keeps_one_sign_of_every_coordinate_whatever_the_order_of_the_tasks(scale, dtype):
    generator = torch.Generator().manual_seed(1)
    for J in matrices(scale, dtype):
        d, size = direction("graddrop", J, {})
        permuted, _ = direction("graddrop", J[torch.randperm(len(J), generator=generator)], {})  # draws from the same seed
        torch.testing.assert_close(permuted, d, rtol=0, atol=float(digits(dtype, 20) * size))
        sums = torch.stack([J.clamp(min=0).sum(dim=0), J.clamp(max=0).sum(dim=0)])
        assert ((d - sums).abs().min(dim=0).values <= digits(dtype, 20) * size).all()


@pytest.mark.parametrize(("scale", "dtype"), CASES)
@pytest.mark.parametrize(("name", "options"), LINEAR)
def test_direction_is_linear_in_the_lengths_of_the_gradients(name, options, scale, dtype):
    """The direction of (a + b) J is the direction of a J plus the direction of b J, for positive factors a, b by task."""
    generator = torch.Generator().manual_seed(1)
    for J in matrices(scale, dtype):
        a, b = torch.rand(2, len(J), 1, generator=generator, dtype=torch.float64).to(dtype) + 0.1
        if name == "pcgrad" and near_orthogonal(J):
            continue
        (first, size), (second, _) = direction(name, a * J, options), direction(name, b * J, options)
        total, size = direction(name, (a + b) * J, options)
        assert (total - first - second).norm() <= digits(dtype, 1000) * size


def near_orthogonal(J):
    """Return whether rounding decides if two gradients conflict."""
    J = J.double()
    return bool(((J @ J.T).abs() <= 1e-5 * J.norm(dim=1) * J.norm(dim=1)[:, None]).any())


@pytest.mark.parametrize(("scale", "dtype"), CASES)
def test_pcgrad_weights_are_at_least_one_and_two_tasks_never_conflict(scale, dtype):
    for J in matrices(scale, dtype):
        weights = build("pcgrad", len(J), {})(J.double() @ J.double().T)
        assert (weights >= 1).all()
        if len(J) == 2:
            d, size = direction("pcgrad", J, {})
            assert (J @ d >= -digits(dtype, 50) * J.norm(dim=1) * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), SCALES_WITH_GRADIENTS)
def test_direction_scales_with_the_gradients(name, options, dtype):
    for J in matrices(1.0, dtype):
        d, size = direction(name, J, options)
        for power in (-20, 3, 20):
            scaled, _ = direction(name, 2.0**power * J, options)
            assert (scaled / 2.0**power - d).norm() <= max(1e-7, digits(dtype, 20)) * size


@pytest.mark.parametrize(("scale", "dtype"), CASES)
def test_mgda_and_nash_stop_where_0_is_in_the_convex_hull(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    for num_tasks, num_parameters in SHAPES:
        if num_tasks == 1:
            continue
        J = scale * matrix(num_tasks, num_parameters, min(num_tasks, num_parameters), generator)
        J[-1] = -(0.5 + torch.rand(num_tasks - 1, generator=generator, dtype=torch.float64)) @ J[:-1]
        J = J.to(dtype)
        d, size = direction("mgda", J, {})
        assert d.norm() <= max(1e-7, digits(dtype, 20)) * size
        assert not direction("nashmtl", J, {})[0].any()
