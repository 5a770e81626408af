import math

import numpy as np
import pytest

from balance.comparison.figures.drawing import POINTS, downsampled, row_styles
from tests.comparison.synthetic import realistic, row

NAN = math.nan


def test_row_styles_have_a_color_per_loss_and_a_dash_per_gradient_balancer():
    styles = row_styles(realistic().rows)
    assert len({styles[label].color for label in ("ls", "uw", "famo", "go4align", "scaleinvls + mgda")}) == 5
    assert styles["uw"].color == styles["uw + pcgrad"].color == styles["uw + nashmtl"].color
    assert styles["uw + pcgrad"].dash == styles["ls + pcgrad"].dash != styles["ls"].dash == (0, ())
    settings = row_styles([row("go4align loss.num_groups=2"), row("go4align loss.num_groups=3")])
    assert len({style.color for style in settings.values()}) == 2


def test_downsampling_keeps_means():
    steps = np.arange(1000.0)
    thin_steps, values = downsampled(steps, 2 * steps)
    assert len(values) == len(thin_steps) == POINTS
    assert values == pytest.approx(2 * thin_steps)
    gaps = np.where(steps % 2 == 0, 1.0, NAN)
    gaps[:100] = NAN
    _, values = downsampled(steps, gaps)
    assert np.isnan(values[:6]).all()
    assert (values[7:] == 1).all()
