import numpy as np
import pytest
import torch

from balance.solvers.projection import project_in_turn


def project(gramian, partners, of=np.array):
    """Coefficients after each vector has met its partner of each turn."""
    K = len(gramian)
    return project_in_turn(of(gramian), [of(turn) for turn in partners], of(list(range(K))), of(np.eye(K).tolist()))


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_a_vector_is_projected_off_a_partner_that_it_conflicts_with(of):
    """By hand: (1, 0) and (-1, 2) have product -1, and squares 1 and 5."""
    gramian = [[1.0, -1.0], [-1.0, 5.0]]
    result = project(gramian, [[1, 0]], of)
    assert np.asarray(result.tolist()) == pytest.approx(np.array([[1, 0.2], [1, 1]]))
    assert project(gramian, [[1, 0], [1, 0]], of).tolist() == result.tolist()  # no conflict remains
    assert project([[1.0, 1.0], [1.0, 5.0]], [[1, 0]], of).tolist() == [[1, 0], [0, 1]]


def test_turns_follow_each_other():
    """By hand: a = (1, 0), b = (-1, 1), c = (0, -1). a - (-1/2) b = (1/2, 1/2) conflicts with c, from which a does not."""
    J = np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
    coefficients = project((J @ J.T).tolist(), [[1, 0, 0], [2, 2, 1]])
    assert coefficients[0].tolist() == [1, 0.5, 0.5]
    assert (coefficients @ J)[0].tolist() == [0.5, 0]


def test_a_zero_vector_conflicts_with_no_vector_whatever_rounding_makes_of_its_products():
    assert project([[1.0, -1e-20], [-1e-20, 0.0]], [[1, 0]]).tolist() == [[1, 0], [1e-20, 1]]


def test_the_gramian_stays():
    gramian = np.array([[1.0, -1.0], [-1.0, 5.0]])
    project_in_turn(gramian, [np.array([1, 0])], np.arange(2), np.eye(2))
    assert gramian.tolist() == [[1, -1], [-1, 5]]


def test_leading_dimensions_are_separate_problems():
    gramians = torch.tensor([[[1.0, -1.0], [-1.0, 5.0]], [[4.0, 1.0], [1.0, 4.0]]])
    eye = torch.eye(2).expand(2, 2, 2).clone()
    result = project_in_turn(gramians, [torch.tensor([1, 0])], torch.arange(2), eye)
    torch.testing.assert_close(result, torch.tensor([[[1.0, 0.2], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]]))
