"""Known numbers of the loss balancers, a row per method; see `tests.references`."""

import pytest
import torch

from balance import loss_balancers
from balance.loss._sac import gaussian_log_density, schedule, tanh_correction
from balance.loss.improvable_gap import reward
from tests.references import tensor

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


def test_uw_with_adam(rows, sequences):
    rule = loss_balancers.build("uw", num_tasks=3).double()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.025)
    for row, step in zip(rows[:6], sequences["uw_init0_adam_lr0.025 (nash-mtl run)"], strict=False):
        losses = tensor(row).requires_grad_()
        torch.testing.assert_close(torch.stack(list(rule.log_variances)).detach(), tensor(step["s"]), rtol=1e-6, atol=1e-7)
        optimizer.zero_grad()
        total = rule(losses).sum()
        total.backward()
        assert total.item() == pytest.approx(step["loss"], rel=1e-6)
        torch.testing.assert_close(losses.grad, tensor(step["dloss"]), rtol=1e-6, atol=1e-7)
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
