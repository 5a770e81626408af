"""Networks and helpers shared by the tests of this folder."""

import pytest
import torch

from balance import compose

J3 = torch.tensor([[-4.0, 2, -4], [2, 6, 8], [3, -3, -12]], dtype=torch.float64)


COMPOSITIONS = {
    "every": lambda rule, **options: compose.every(1, rule, 3, **options),
    "smoothed": lambda rule, **options: compose.smoothed(rule, 0.5, 3, **options),
    "grouped": lambda rule, **options: compose.grouped(rule, [[0], [1], [2]], 3, **options),
    "nested": lambda rule, **options: compose.every(
        1, compose.smoothed(compose.grouped(rule, [[0], [1], [2]], 3, **options), 0.5, 3), 3
    ),
}


compositions = pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=COMPOSITIONS)
