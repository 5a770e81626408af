import copy
import pickle

import pytest
import torch

from balance.rules.generator import SeededGenerator
from tests.loss.defaults import CONTEXTS


@pytest.mark.parametrize("context", CONTEXTS)
def test_seeded_generator_draws_the_same_numbers_whatever_the_defaults(context):
    def draw(generator):
        orders = generator.permutations(2, 5), generator.orders_of_others(3)
        return generator.normal(2, 3), generator.uniform(4), *orders

    expected = draw(SeededGenerator(3))
    with CONTEXTS[context]():
        drawn = draw(SeededGenerator(3))
    assert [t.dtype for t in drawn] == [torch.float64, torch.float32, torch.int64, torch.int64]
    assert all(t.device.type == "cpu" for t in drawn)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 20, 100])
def test_orders_of_others_are_permutations_without_the_number_itself(count):
    generator, same = SeededGenerator(3), SeededGenerator(3)
    for _ in range(3):
        expected = [[j for j in order if j != i] for i, order in enumerate(same.permutations(count, count).tolist())]
        assert generator.orders_of_others(count).tolist() == expected


def test_seeded_generator_starts_again_with_another_seed():
    generator = SeededGenerator(3)
    generator.normal(5)
    generator.reseed(4)
    assert torch.equal(generator.normal(5), SeededGenerator(4).normal(5))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_generator_goes_on_alike_and_independently(duplicate):
    generator = SeededGenerator(3)
    generator.normal(5)
    other = duplicate(generator)
    expected = generator.normal(5)
    assert torch.equal(other.normal(5), expected)
