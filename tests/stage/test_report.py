import pytest
import torch

from balance import Report


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
