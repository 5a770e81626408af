"""Known numbers of scalarisations, and of loss balancers that follow rates or validation; see `tests.references`."""

import pytest
import torch

from balance import loss_balancers
from tests.references import GOLDEN, tensor
from tests.references.test_loss import close, run_losses


def test_gls(rows, sequences):
    """The weights are the golden ones. The vector form has the value M log M where the scalar has M."""
    derivatives, totals = run_losses(loss_balancers.build("gls"), rows)
    close(derivatives, [step["dloss"] for step in sequences["gls"]])
    means = tensor([step["loss"] for step in sequences["gls"]])
    assert totals == pytest.approx((means * means.log()).tolist(), rel=1e-9)


def test_stch(rows, sequences):
    rule = loss_balancers.build("stch", num_tasks=3, mu=1.0, warmup_epochs=1)
    derivatives, _ = run_losses(rule, rows, epochs=True)
    close(derivatives, [step["dloss"] for step in sequences["stch_libmtl_mu1_warmup_epoch1_rows_are_epochs"]])


@pytest.mark.parametrize(("key", "init"), [("uw_init0_sgd_lr0.025", 0.0), ("uw_init-0.5_sgd_lr0.025", 0.5)])
def test_imtl_l(rows, sequences, key, init):
    """IMTL-L at s is twice UW at -s, so half the learning rate gives the negative of UW's golden sequence."""
    rule = loss_balancers.build("imtl_l", num_tasks=3, init=init).double()
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.0125)
    for row, step in zip(rows[:6], sequences[key]["steps"], strict=False):
        losses = tensor(row).requires_grad_()
        close(-torch.stack(list(rule.log_scales)).detach(), step["s"])
        optimizer.zero_grad()
        total = rule(losses).sum()
        total.backward()
        assert total.item() == pytest.approx(2 * step["loss"], rel=1e-9)
        close(losses.grad / 2, step["dloss"])
        optimizer.step()


# Method, options, losses, derivatives
DERIVATIVES = [
    ("constant", {"weights": [0.5, 0.0, 2.0]}, [1.0, 2.0, 4.0], [0.5, 0.0, 2.0]),  # by definition
    # the first step has the first weights
    ("linear_schedule", {"start": [0.0, 2.0, 1.0], "steps": 4}, [1.0, 2.0, 4.0], [0.0, 2.0, 1.0]),
    # by hand: terms 0.2, 1.0, 0.9
    ("tchebycheff", {"preference": [0.2, 0.5, 0.3]}, [1.0, 2.0, 3.0], [0.0, 0.5, 0.0]),
    ("tchebycheff", {"preference": [0.2, 0.5, 0.3], "reference": [0.0, 0.5, 0.0]}, [1.0, 2.0, 3.0], [0.0, 0.0, 0.3]),
    ("tchebycheff", {"preference": [0.2, 0.5, 0.3], "rho": 0.1}, [1.0, 2.0, 3.0], [0.1, 0.6, 0.1]),
    # by hand: two terms of 1 share the gradient
    ("tchebycheff", {"preference": [1.0, 0.5, 0.125]}, [1.0, 2.0, 4.0], [0.5, 0.25, 0.0]),
    # by hand: terms 0.2 + 0.2 S, 0.5 * 2 + 0.5 S, 0.9 + 0.3 S with S = 0.1 * 6
    ("tchebycheff", {"preference": [0.2, 0.5, 0.3], "rho": 0.1, "form": "modified"}, [1.0, 2.0, 3.0], [0.05, 0.55, 0.05]),
    # TorchJD 0.18, which adds 1e-12 inside of the square root of PBI
    (
        "pbi",
        {"preference": [0.2, 0.5, 0.3], "reference": [0.1, 0.2, -0.3]},
        [1.2, 0.5, 3.0],
        [1.0343567287619337, -1.9410248105053056, 4.600274865990547],
    ),
    (
        "cosmos",
        {"preference": [0.2, 0.5, 0.3], "penalty": 2.0},
        [1.2, 0.5, 3.0],
        [0.15637157877953123, 0.06835710920174531, 0.3893918502878966],
    ),
    (
        "stch",
        {"form": "plain", "mu": 0.5, "preference": [0.2, 0.5, 0.3], "reference": [0.1, 0.2, -0.3]},
        [1.2, 0.5, 3.0],
        [0.030609362746660786, 0.06652625396029742, 0.21417020350383037],
    ),
]


@pytest.mark.parametrize(("name", "options", "row", "expected"), DERIVATIVES)
def test_derivatives(name, options, row, expected):
    losses = tensor(row).requires_grad_()
    weighted = loss_balancers.build(name, num_tasks=len(row), **options)(losses)
    close(torch.autograd.grad(weighted.sum(), losses)[0], expected)


def test_linear_schedule(rows):
    rule = loss_balancers.build("linear_schedule", num_tasks=3, start=[0.0, 2.0, 1.0], end=[1.0, 1.0, 1.0], steps=4)
    derivatives, _ = run_losses(rule, rows)
    # by hand
    close(derivatives, [[0, 2, 1], [0.25, 1.75, 1], [0.5, 1.5, 1], [0.75, 1.25, 1], [1, 1, 1], [1, 1, 1]])


# Weights at row 5, in 50 digits by mpmath from the formulas of the papers
RATES = [
    ("softadapt", {}, [0.3334397585250858, 0.33544641101374845, 0.33111383046116577]),
    (
        "softadapt",
        {"variant": "normalized", "beta": 0.5, "window": 3},
        [0.3192802977769349, 0.3842350899129634, 0.2964846123101017],
    ),
    ("softadapt", {"variant": "loss_weighted"}, [0.26469571130694647, 0.14034132062158072, 0.5949629680714729]),
    (
        "relobralo",
        {"alpha": 0.9, "temperature": 0.1, "rho": 1.0},
        [0.9489797695718017, 1.1525546156017037, 0.8984656148264946],
    ),
    (
        "relobralo",
        {"alpha": 0.9, "temperature": 0.1, "rho": 0.0},
        [0.4394527545805208, 2.2493358587528784, 0.31121138666660086],
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), RATES)
def test_rates(rows, name, options, expected):
    derivatives, _ = run_losses(loss_balancers.build(name, num_tasks=3, **options), rows)
    close(derivatives[-1], expected)


def test_softadapt_of_the_authors():
    """Losses and weights of a test in the authors' repository, whose weights have five digits."""
    losses = tensor([[1, 2, 3, 4, 5], [150, 100, 50, 10, 0.1], [1500, 1000, 500, 100, 1]]).T
    rule = loss_balancers.build("softadapt", num_tasks=3, window=5, point="oldest")
    for row in losses:
        weights = rule(row) / row
    assert weights.tolist() == pytest.approx([9.9343e-01, 6.5666e-03, 3.8908e-22], rel=1e-4)


def test_resnorm(rows):
    """The objective of PhysicsNeMo Sym, differentiated by autograd and minimised by Adam of torch."""
    alpha, lr, L = 1.5, 0.1, tensor(rows[:6])
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam, expected = torch.optim.Adam([logits], lr=lr), []
    for row in L:
        with torch.no_grad():
            logits += (3 / logits.exp().sum()).log()
        expected.append(logits.exp().tolist())
        pace = row / L[0]
        objective = (logits.exp() * row - row.mean() * (pace / pace.mean()) ** alpha).abs().sum()
        adam.zero_grad()
        objective.backward()
        adam.step()
    derivatives, _ = run_losses(loss_balancers.build("resnorm", num_tasks=3, alpha=alpha, lr=lr), rows)
    close(derivatives, expected)


@pytest.mark.parametrize(("ascent", "optimizer"), [("adam", torch.optim.Adam), ("gradient", torch.optim.SGD)])
@pytest.mark.parametrize("every", [1, 2])
def test_minimax(rows, ascent, optimizer, every):
    """The optimizers of torch, which maximise the weighted sum."""
    weights = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    ascending, expected = optimizer([weights], lr=0.1, maximize=True), []
    for step, row in enumerate(rows[:6]):
        expected.append(weights.tolist())
        ascending.zero_grad()
        (weights * tensor(row)).sum().backward()
        if step % every == 0:
            ascending.step()
    rule = loss_balancers.build("minimax", num_tasks=3, lr=0.1, ascent=ascent, every=every, init=2.0)
    derivatives, _ = run_losses(rule, rows)
    close(derivatives, expected)


# Weights after each observation from the third after the first one: the authors' code (MFTCoder, commit 08ab5ee) with warm-up
# 3, in float64. Where it has a divergence factor above 1, which the paper limits, there is None.
MORE_ROWS = [[0.62, 0.39, 1.45], [0.6, 0.42, 1.42], [0.59, 0.46, 1.41]]
COBA = [
    [0.2011559758793343, 0.6570159518292553, 0.1418280722914105],
    None,
    None,
    None,
    [0.30447194736850236, 0.43531437069886136, 0.2602136819326363],
    [0.3607872462545513, 0.326248912573195, 0.31296384117225373],
    [0.40800291936204924, 0.24504019085860204, 0.34695688977934863],
]


def test_coba():
    rule = loss_balancers.build("coba", num_tasks=3, warmup=3)
    ones = torch.ones(3, dtype=torch.float64)
    for step, row in enumerate(GOLDEN["loss_methods"]["losses_rows_0_to_6"] + MORE_ROWS):
        rule.observe_validation(tensor(row))
        expected = [1 / 3] * 3 if step < 3 else COBA[step - 3]
        if expected is not None:
            close(rule(ones), expected)
