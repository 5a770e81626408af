"""Known numbers of pairs of rules; see `tests.references`."""

import pytest
import torch

from balance import Balancer
from tests.references import GOLDEN, tensor

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
