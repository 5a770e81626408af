import pytest
import torch
from torch import nn

from balance import Balancer, Report


def report(gramian):
    ones = torch.ones(3)
    return Report(("a", "b", "c"), ones, 2 * ones, 3 * ones, 4 * ones, None if gramian is None else torch.tensor(gramian))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cosines_do_not_depend_on_the_lengths_and_a_zero_gradient_has_none(scale):
    """By hand: gradients (1, 0), (-1, 1) and (0, 0)."""
    rows = report([[scale, -scale, 0.0], [-scale, 2 * scale, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, -(0.5**0.5), 0.0], [-(0.5**0.5), 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rows.cosines, expected)
    assert rows.conflicts == 1


def test_rounding_leaves_cosines_in_range():
    rows = report([[1.0, -1.000001, 1.0], [-1.000001, 1.0, 1.000001], [1.0, 1.000001, -1e-20]])
    assert rows.cosines.abs().max() == 1
    assert rows.cosines[:, 2].tolist() == [0, 0, 0]


def test_without_a_gramian_there_are_no_cosines():
    rows = report(None)
    assert rows.cosines is None
    assert rows.conflicts is None
    assert rows.as_metrics() == {
        f"{group}/{task}": value for group, value in (("loss", 1), ("weight", 3), ("gradient_weight", 4)) for task in "abc"
    }


class InPlace(nn.Module):
    """A rule that changes its Gramian, and returns its state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.zeros(2, dtype=torch.float64))

    def forward(self, gramian):
        gramian.fill_(7.0)
        return self.weights.add_(1)


def test_a_record_keeps_its_numbers_whatever_a_rule_does_with_its_own():
    W, x = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.arange(3, dtype=torch.float64)
    balancer = Balancer(2, gradient=InPlace())
    reports = [balancer.backward({"0": (W * x).sum(), "1": (W * x).square().sum()}, shared=[W]) for _ in range(2)]
    for step, record in enumerate(reports, 1):
        assert record.gramian.tolist() == [[5, 18], [18, 68]]
        assert record.gradient_weights.tolist() == record.total_weights.tolist() == [step, step]
