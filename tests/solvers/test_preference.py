import numpy as np
import pytest

from balance.solvers.preference import correction_weights, highest_product, tangent_weights


def test_highest_product_of_conditions_that_contradict_each_other_is_none():
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert highest_product(np.ones(2), rows, np.array([0.8, 0.8])) is None
    np.testing.assert_allclose(highest_product(np.array([1.0, 2.0]), rows, np.array([0.8, -np.inf])), [0.8, 0.2])


def test_highest_product_of_conditions_of_any_scale():
    rows = np.array([[1e-20, 0.0], [0.0, 1e20]])
    np.testing.assert_allclose(highest_product(np.array([1e30, 2e30]), rows, np.array([3e-21, 1e19])), [0.3, 0.7])
    np.testing.assert_allclose(highest_product(np.zeros(2), np.zeros((1, 2)), np.zeros(1)).sum(), 1)


def test_correction_follows_the_gradient_of_the_function_if_it_must():
    G = np.eye(2)
    slope = np.array([-1.0, 1.0]) / np.sqrt(2)
    np.testing.assert_allclose(correction_weights(G, slope, 1.0), slope, atol=1e-12)


def test_tangent_of_a_vanishing_gradient_is_the_shortest_vector():
    np.testing.assert_allclose(tangent_weights(np.diag([1.0, 9.0]), np.zeros(2)), [0.9, 0.1])
    parallel = np.array([[4.0, 2.0], [2.0, 1.0]])  # both gradients are orthogonal to the level set
    weights = tangent_weights(parallel, np.array([1.0, 0.0]))
    assert weights @ parallel @ weights == pytest.approx(0, abs=1e-12)
