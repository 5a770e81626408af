import pytest
import torch

from balance.testing import make_jacobian
from tests.gradient.directions import build, direction


def test_krum_drops_outliers():
    J = torch.ones(6, 4, dtype=torch.float64) + 0.1 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    J[2] *= -100
    J[4] *= 50
    weights = build("krum", 6, num_byzantine=2, num_selected=3)(J @ J.T)
    assert weights[[2, 4]].tolist() == [0, 0]
    assert sorted(weights.tolist())[-3:] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(("distance", "chosen"), [("euclidean", 1), ("squared", 2)])
def test_squares_weigh_far_neighbours_more(distance, chosen):
    """On a line, at 0, 3, 5, 11 and 12: sums of the three smallest distances 19, 13, 13 ... and of their squares."""
    points = torch.tensor([0.0, 3.0, 5.0, 11.0, 12.0], dtype=torch.float64)[:, None]
    distances = (points - points.T).abs() ** (1 if distance == "euclidean" else 2)
    scores = distances.sort(dim=1).values[:, 1:4].sum(dim=1)
    assert scores.argmin() == chosen
    assert build("krum", 5, distance=distance)(points @ points.T).argmax() == chosen


def test_krum_takes_the_earlier_of_equal_scores():
    J = make_jacobian(3, "generic", 0)
    assert build("krum", 3)(J @ J.T).argmax() < build("krum", 3)(J.flip(0) @ J.flip(0).T).flip(0).argmax()


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_krum_averages_tasks_without_neighbours(num_tasks):
    assert build("krum", num_tasks)(torch.eye(num_tasks)).tolist() == [1 / num_tasks] * num_tasks


def test_krum_refuses_steps_with_too_few_tasks():
    rule = build("krum", 4, num_byzantine=1)
    with pytest.raises(ValueError, match="num_byzantine of 'krum' must be at most 3 tasks - 3, but got 1"):
        rule(torch.eye(3))


def test_trimmed_mean_drops_the_extremes_of_every_coordinate():
    J = make_jacobian(7, "generic", 0)
    for trim in (0, 1, 2, 3):
        torch.testing.assert_close(direction("trimmed_mean", J, trim=trim), J.sort(dim=0).values[trim : 7 - trim].mean(dim=0))
    torch.testing.assert_close(direction("trimmed_mean", J), direction("trimmed_mean", J, trim=1))
    torch.testing.assert_close(direction("trimmed_mean", J, trim=3), J.median(dim=0).values)


@pytest.mark.parametrize("trim", [-1, 1, 5])
def test_trimmed_mean_needs_more_tasks_than_it_drops(trim):
    with pytest.raises(ValueError, match="trim of 'trimmed_mean' must be at least 0 and less than half of 2 tasks"):
        build("trimmed_mean", 2, trim=trim)(torch.ones(2, 3))


def test_trimmed_mean_needs_a_matrix():
    with pytest.raises(ValueError, match="jacobian must have shape"):
        build("trimmed_mean", 2)(torch.ones(3))
