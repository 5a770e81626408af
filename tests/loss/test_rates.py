import pytest
import torch

from balance import loss_balancers
from balance.loss.rates import slope_coefficients
from tests.loss.derivatives import effective


@pytest.mark.parametrize("window", range(2, 9))
@pytest.mark.parametrize("point", ["newest", "oldest"])
def test_slopes_are_exact_for_polynomials(window, point):
    x = torch.arange(window, dtype=torch.float64)
    at = x[-1] if point == "newest" else x[0]
    for degree in range(window):
        slope = slope_coefficients(window, point) @ x**degree
        expected = degree * at ** max(degree - 1, 0)
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("variant", ["plain", "normalized"])
@pytest.mark.parametrize("window", [2, 5])
def test_constant_losses_keep_equal_weights(variant, window):
    """Normalising slopes of zero must not magnify their rounding errors."""
    rule = loss_balancers.build("softadapt", num_tasks=3, variant=variant, window=window)
    L = torch.tensor([0.1, 1 / 3, 7.7], dtype=torch.float64)
    for _ in range(8):
        assert effective(rule, L).tolist() == [pytest.approx(1 / 3)] * 3


def test_softadapt_waits_until_its_window_is_full():
    rule = loss_balancers.build("softadapt", num_tasks=2, window=3)
    for step, row in enumerate([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]]):
        weights = effective(rule, torch.tensor(row, dtype=torch.float64))
        assert (weights[0] > weights[1]) == (step == 2)


def test_softadapt_normalized_ignores_the_unit():
    sequence = torch.tensor([[1.0, 5.0], [2.0, 4.5], [2.5, 3.0]], dtype=torch.float64)
    a, b = (loss_balancers.build("softadapt", num_tasks=2, variant="normalized") for _ in range(2))
    for row in sequence:
        torch.testing.assert_close(effective(a, row), effective(b, 1000 * row))


def test_softadapt_weighted_by_losses_names_a_negative_loss():
    rule = loss_balancers.build("softadapt", num_tasks=2, variant="loss_weighted")
    with pytest.raises(ValueError, match="Loss of task '1' is -1, but must be above 0, because 'softadapt' weighs"):
        rule(torch.tensor([1.0, -1.0]))
    assert loss_balancers.build("softadapt", num_tasks=2)(torch.tensor([1.0, -1.0])).isfinite().all()


def test_relobralo_weights_ignore_the_unit_and_favour_losses_that_fall_little():
    sequence = torch.tensor([[1.0, 1.0], [0.9, 0.2], [0.8, 0.1]], dtype=torch.float64)
    a, b = (loss_balancers.build("relobralo", num_tasks=2, alpha=0.5, rho=0.0) for _ in range(2))
    for row in sequence:
        weights = effective(a, row)
        torch.testing.assert_close(weights, effective(b, torch.tensor([7.0, 0.1]) * row))
    assert weights[0] > 1 > weights[1]


def test_relobralo_draws_from_its_own_generator():
    sequence = 0.5 + torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        rule = loss_balancers.build("relobralo", num_tasks=2, alpha=0.5, rho=0.5, seed=seed)
        runs.append(torch.stack([effective(rule, row) for row in sequence]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_relobralo_looks_back_with_the_given_probability():
    """With alpha = 1 the weights change only where the past is forgotten."""
    rule = loss_balancers.build("relobralo", num_tasks=2, alpha=1.0, rho=0.75)
    sequence = 0.5 + torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.stack([effective(rule, row) for row in sequence])
    changes = (weights[1:] != weights[:-1]).any(dim=1).double().mean()
    assert changes.item() == pytest.approx(0.25, abs=0.04)


def test_resnorm_takes_weight_from_losses_above_the_mean():
    rule = loss_balancers.build("resnorm", num_tasks=3, alpha=0.0, lr=0.02)
    L = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)  # mean 1.83
    for _ in range(30):
        weights = effective(rule, L)
    assert weights[2] < 1 < weights[0]
    assert weights[0].item() == pytest.approx(weights[1].item())  # both are below the mean, and Adam ignores the distance
    assert weights.sum().item() == pytest.approx(3)


def test_resnorm_keeps_equal_losses_and_one_task_at_weight_one():
    for K in (1, 3):
        rule = loss_balancers.build("resnorm", num_tasks=K, lr=0.5)
        for step in range(5):
            losses = torch.full((K,), 0.1 + 0.7 * step, dtype=torch.float64)
            assert effective(rule, losses).tolist() == [pytest.approx(1)] * K


def test_a_late_task_begins_with_its_own_first_loss():
    for name in ("relobralo", "resnorm"):
        rule = loss_balancers.build(name, num_tasks=2)
        rule(torch.tensor([3.0]), present=torch.tensor([0]))
        rule(torch.tensor([2.0, 50.0]))
        assert rule.first.tolist() == [3, 50]


def test_minimax_weights_grow_with_their_losses_and_refuse_negative_ones():
    rule = loss_balancers.build("minimax", num_tasks=3, ascent="gradient", lr=0.1)
    L = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert effective(rule, L).tolist() == [1, 1, 1]
    assert effective(rule, L).tolist() == [1, 1.1, 1.2]
    with pytest.raises(ValueError, match="Loss of task '0' is -1, but must be above 0, because 'minimax' multiplies"):
        rule(torch.tensor([-1.0, 1.0, 1.0]))
