import math
from types import SimpleNamespace

import pytest
import torch

from balance.stage.length import stretch_of_direction, stretch_of_trunk, stretch_of_weights, stretch_to_sum

GRAMIAN = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)  # the sum of the gradients has length 3


def test_weights_are_stretched_to_their_number():
    assert stretch_to_sum(torch.tensor([0.5, 0.25, 0.25])) == 3
    assert stretch_to_sum(torch.tensor([1.0, -1.0])) == 1
    assert stretch_to_sum(torch.tensor([1.0, -3.0])) == 1


def test_a_direction_is_stretched_to_the_length_of_the_summed_gradient():
    assert stretch_of_direction("norm", GRAMIAN, 4.0) == 1.5
    assert stretch_of_direction("none", GRAMIAN, 4.0) == 1
    assert stretch_of_direction("norm", GRAMIAN, 1e-20, 1e-18) == 1  # zero but for rounding
    assert stretch_of_direction("norm", torch.tensor([[1.0, -1.0], [-1.0, 1.0 - 1e-7]]), 4.0) == 0
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert stretch_of_weights("norm", GRAMIAN, weights) == pytest.approx(2)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0 + 1e-15]], dtype=torch.float64)
    assert stretch_of_weights("norm", opposite, weights) == 1


@pytest.mark.parametrize(
    ("lengths", "fixed", "factor"),
    [
        ((2.0, 6.0), False, 3.0),  # of the direction, and of the summed gradient
        ((2.0, 6.0), True, 3**0.5 * 0.5),  # the measured direction has length 3 ** 0.5
        ((0.0, 6.0), False, 7.0),
        ((math.inf, 6.0), False, 7.0),
        ((math.nan, 6.0), False, 7.0),
        ((2.0, math.inf), False, 7.0),
    ],
)
def test_the_whole_trunk_gets_the_intended_length(lengths, fixed, factor):
    """The given factor remains if a length is zero or not finite."""
    remaining = list(lengths)
    gradients = SimpleNamespace(trunk_length=lambda weights: 10 * remaining.pop(0))
    weighting = SimpleNamespace(pull_back=lambda weights: weights, sums=torch.ones(2))
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert stretch_of_trunk(gradients, weighting, weights, GRAMIAN, 10.0, 7.0, fixed=fixed) == pytest.approx(factor)
