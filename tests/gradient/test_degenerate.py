"""Results of the rules where their formulas are undefined: as documented, and never NaN for finite input."""

import numpy as np
import pytest
import torch

from balance import gradient_balancers
from balance.testing import KINDS, make_jacobian

NAMES = gradient_balancers.names()


def build(name, num_tasks, **options):
    return gradient_balancers.build(name, num_tasks=num_tasks, **options)


def direction(name, J, **options):
    J = torch.as_tensor(J, dtype=torch.float64)
    rule = build(name, len(J), **options)
    return rule(J) if gradient_balancers.sees(name) == "jacobian" else rule(J @ J.T) @ J


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 100])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_finite_out(name, kind, scale, num_tasks):
    for seed in range(2):
        assert direction(name, scale * make_jacobian(num_tasks, kind, seed)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_scales_that_differ_by_thirty_decades(name):
    J = make_jacobian(8, "generic", 3) * torch.logspace(-15, 15, 8, dtype=torch.float64)[:, None]
    assert direction(name, J).isfinite().all()


OPPOSITE = [[1.0, -2.0], [-1.0, 2.0]]
STATIONARY = [[-4.0, 2.0], [2.0, 6.0], [3.0, -3.0]]  # 0 is inside the convex hull

# method: (direction at G = 0, opposite gradients, a zero row beside (1, 2, 2), one task (3, 4))
EXPECTED = {
    "mgda": ([0, 0], [0, 0], [0, 0, 0], [3, 4]),
    "pcgrad": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "cagrad": ([0, 0], [0, 0], [1 / 2.32, 2 / 2.32, 2 / 2.32], [3 * 1.4 / 1.16, 4 * 1.4 / 1.16]),
    "imtl": ([0, 0], [0, 0], [1, 2, 2], [3, 4]),
    "nashmtl": ([0, 0], [0, 0], [1 / 3, 2 / 3, 2 / 3], [0.6, 0.8]),
    "graddrop": ([0, 0], None, [1, 2, 2], [3, 4]),
}


@pytest.mark.parametrize("name", NAMES)
def test_documented_results(name):
    at_zero, opposite, zero_row, one = EXPECTED[name]
    assert direction(name, [[0.0, 0.0], [0.0, 0.0]]).tolist() == at_zero
    if opposite is not None:
        assert direction(name, OPPOSITE).tolist() == pytest.approx(opposite, abs=1e-12)
    assert direction(name, [[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]]).tolist() == pytest.approx(zero_row)
    assert direction(name, [[3.0, 4.0]]).tolist() == pytest.approx(one)


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_act_like_one_gradient_twice(name):
    """Equal gradients get equal weights, or are interchangeable."""
    J = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    assert direction(name, J).isfinite().all()
    if gradient_balancers.sees(name) == "gramian" and name not in ("pcgrad", "cagrad"):
        weights = build(name, 3)(J @ J.T)
        assert weights[0].item() == pytest.approx(weights[1].item())


def test_nash_has_no_common_bargain_at_a_stationary_point():
    J = torch.tensor(STATIONARY, dtype=torch.float64)
    assert build("nashmtl", 3)(J @ J.T).tolist() == [0, 0, 0]
    assert direction("mgda", STATIONARY).abs().max() < 1e-9


@pytest.mark.parametrize("J", [STATIONARY, [[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]]])
def test_cagrad_is_not_the_mean_whatever_the_scale_of_the_gradients(J):
    """The official solver returns the mean for all short gradients, and where 0 is in the convex hull."""
    J = torch.tensor(J, dtype=torch.float64)
    unit = build("cagrad", 3)(J @ J.T)
    assert (unit - unit.mean()).abs().max() > 0.01
    for scale in (1e-12, 1e-3, 1e3, 1e12):
        torch.testing.assert_close(build("cagrad", 3)(scale**2 * (J @ J.T)), unit)


def test_cagrad_is_the_mean_where_the_mean_is_zero_or_a_zero_gradient_is_all_that_gains_nothing():
    assert build("cagrad", 2)(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()).tolist() == pytest.approx([0.5 / 1.16] * 2)
    J = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    assert build("cagrad", 3)(J @ J.T).tolist() == pytest.approx([1 / 3 / 1.16] * 3)


def test_nash_weights_are_never_stale():
    """The official solver keeps earlier weights when it fails, which it does for short gradients."""
    rule = build("nashmtl", 3, max_norm=None)
    for scale in (1.0, 1e-4, 1e4):
        J = scale * torch.tensor([[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]], dtype=torch.float64)
        weights = rule(J @ J.T)
        torch.testing.assert_close(weights * (J @ J.T @ weights), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0, None])
def test_nash_direction_has_length_root_k_or_max_norm(max_norm):
    d = direction("nashmtl", make_jacobian(5, "generic", 0), max_norm=max_norm)
    assert d.norm().item() == pytest.approx(min(5**0.5, max_norm or np.inf))


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_mgda_normalizations(normalization):
    """Weights of the shortest vector between gradients that are divided by length, loss, or both."""
    J, losses = make_jacobian(4, "generic", 0), torch.tensor([0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
    divisor = {"l2": J.norm(dim=1), "loss": losses, "loss+": losses * J.norm(dim=1)}[normalization]
    normalised = J / divisor[:, None]
    keywords = {} if normalization == "l2" else {"losses": losses}
    weights = build("mgda", 4, normalization=normalization)(J @ J.T, **keywords)
    torch.testing.assert_close(weights, build("mgda", 4)(normalised @ normalised.T))
    zero_row = make_jacobian(4, "zero_row", 0)
    assert build("mgda", 4, normalization=normalization)(zero_row @ zero_row.T, **keywords)[0] == 1


@pytest.mark.parametrize("losses", [None, torch.tensor([1.0, 0.0])])
def test_mgda_needs_positive_losses_to_divide_by(losses):
    with pytest.raises(ValueError, match="losses must be positive"):
        build("mgda", 2, normalization="loss")(torch.eye(2), losses=losses)


@pytest.mark.parametrize("rescale", ["none", "paper", "bound"])
def test_cagrad_stays_within_its_radius(rescale):
    J = make_jacobian(5, "generic", 2)
    mean = J.mean(dim=0)
    d = direction("cagrad", J, c=0.7, rescale=rescale) * {"none": 1, "paper": 1 + 0.7**2, "bound": 1.7}[rescale]
    assert (d - mean).norm().item() == pytest.approx(0.7 * mean.norm().item())
    torch.testing.assert_close(direction("cagrad", J, c=0.0, rescale=rescale), mean)


def test_imtl_and_nash_agree_in_direction_for_two_tasks():
    J = make_jacobian(2, "generic", 5)
    a, b = direction("imtl", J), direction("nashmtl", J)
    torch.testing.assert_close(a / a.norm(), b / b.norm())


@pytest.mark.parametrize("name", ["cagrad", "nashmtl"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6])
def test_cvxpy_agrees(name, num_tasks):
    """An independent convex program as oracle, to the accuracy of its solver."""
    for seed in range(3):
        J = make_jacobian(num_tasks, "generic", seed)
        a, b = direction(name, J), direction(name, J, solver="cvxpy")
        assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize("name", ["cagrad", "nashmtl"])
def test_cvxpy_agrees_where_there_is_no_solution(name):
    torch.testing.assert_close(direction(name, OPPOSITE, solver="cvxpy"), direction(name, OPPOSITE), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cagrad", {"c": -0.1}, "not be negative"),
        ("cagrad", {"rescale": 3}, "must be one of 'none', 'paper', 'bound', 0, 1, 2"),
        ("nashmtl", {"max_norm": 0.0}, "must be positive or None"),
        ("nashmtl", {"update_every": 5}, "has no option 'update_every'"),
        ("graddrop", {"leak": 1.5}, r"must be in 0\.\.1"),
        ("mgda", {"normalization": "l1"}, "must be one of"),
    ],
)
def test_mistakes(name, options, message):
    from balance import Balancer

    with pytest.raises(ValueError, match=message):
        Balancer(3, gradient=name, gradient_options=options)


@pytest.mark.parametrize(("number", "name"), list(enumerate(["none", "paper", "bound"])))
def test_numbers_of_the_papers_code_are_aliases_of_cagrads_rescale(number, name):
    J = make_jacobian(3, "generic", 0)
    assert torch.equal(direction("cagrad", J, rescale=number), direction("cagrad", J, rescale=name))


def test_graddrop_wants_a_matrix():
    with pytest.raises(ValueError, match="shape"):
        build("graddrop", 2)(torch.ones(3))
