import pytest
import torch

from balance.diagnosis.statistics import Pair, Statistics
from tests.diagnosis.problems import Linear, Quadratics, diagnose


def test_numbers_that_are_known():
    diagnosis = diagnose(Quadratics(a=[2.0, 0, 0], b=[-3.0, 4, 0], c=[0.0, 0, 1]), lr=0.1, steps=1)
    assert diagnosis.tasks == ("a", "b", "c")
    assert (diagnosis.parameters, diagnosis.batches, diagnosis.steps, diagnosis.lr) == (3, 3, 1, 0.1)
    numbers = diagnosis.as_dict()["start"]
    assert numbers["loss_median"] == pytest.approx({"a": 4, "b": 25, "c": 1})
    assert numbers["loss_min"] == pytest.approx({"a": 2, "b": 12.5, "c": 0.5})
    assert numbers["loss_max"] == pytest.approx({"a": 6, "b": 37.5, "c": 1.5})
    assert numbers["loss_ratio"] == pytest.approx(25)
    assert numbers["gradient_norm"] == pytest.approx({"a": 4, "b": 10, "c": 2})
    assert numbers["gradient_norm_ratio"] == pytest.approx(5)
    assert numbers["relative_gradient_norm"] == pytest.approx({"a": 1, "b": 0.4, "c": 2})
    assert numbers["relative_gradient_norm_ratio"] == pytest.approx(5)
    # the sum of the targets is (-1, 4, 1), of squared length 18
    assert numbers["share_of_sum"] == pytest.approx({"a": -2 / 18, "b": 19 / 18, "c": 1 / 18})
    assert numbers["conflict_share"] == pytest.approx(1 / 3)
    assert diagnosis.start.remaining_length == pytest.approx((18 / 30) ** 0.5)
    (ab, ac, bc) = diagnosis.start.pairs
    assert (ab.tasks, ac.tasks, bc.tasks) == (("a", "b"), ("a", "c"), ("b", "c"))
    assert (ab.mean, ac.mean, bc.mean) == pytest.approx((-0.6, 0, 0))
    assert (ab.spread, ac.spread, bc.spread) == pytest.approx((0, 0, 0), abs=1e-9)
    assert (ab.reading, ac.reading, bc.reading) == ("conflict", "orthogonal", "orthogonal")


def test_spread_over_batches():
    slopes = [([1.0, 0], [0.6, 0.8]), ([1.0, 0], [-0.8, 0.6])]
    batches = [{"a": (1.0, torch.tensor(a).double()), "b": (1.0, torch.tensor(b).double())} for a, b in slopes]
    (pair,) = diagnose(Linear(2), batches, steps=1).start.pairs
    assert pair.mean == pytest.approx(-0.1)
    assert pair.spread == pytest.approx(1.4 / 2**0.5)
    assert pair.reading == "noise"


@pytest.mark.parametrize(
    ("mean", "spread", "reading"),
    [
        (-0.5, 0.2, "conflict"),
        (0.5, 0.2, "agreement"),
        (-0.5, 0.4, "noise"),
        (0.5, 0.4, "noise"),
        (-0.04, 0.01, "orthogonal"),
        (0.0, 0.06, "noise"),
        (-0.06, 0.01, "conflict"),
    ],
)
def test_reading(mean, spread, reading):
    assert Pair(("a", "b"), mean, spread).reading == reading


def test_remaining_length_of_gradients_that_are_all_zero_is_one():
    zero = torch.zeros(2, 2, 2, dtype=torch.float64)
    assert Statistics(("a", "b"), torch.ones(2, 2), zero, zero).remaining_length == 1
