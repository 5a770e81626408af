import copy
import pickle

import pytest
import torch

from balance.rules.generator import SeededGenerator
from tests.loss.defaults import CONTEXTS


@pytest.mark.parametrize("context", CONTEXTS)
def test_seeded_generator_draws_the_same_numbers_whatever_the_defaults(context):
    def draw(generator):
        return generator.normal(2, 3), generator.uniform(4), generator.permutations(2, 5)

    expected = draw(SeededGenerator(3))
    with CONTEXTS[context]():
        drawn = draw(SeededGenerator(3))
    assert [(t.dtype, t.device.type) for t in drawn] == [(torch.float64, "cpu"), (torch.float32, "cpu"), (torch.int64, "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


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
