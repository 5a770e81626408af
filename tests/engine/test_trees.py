"""Leaves of nested structures."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest

from balance.engine.trees import leaves_of, map_leaves

Pair = namedtuple("Pair", "left right")


class Named(dict):
    """A dict of a subclass, which torch does not register as a tree."""


@pytest.mark.parametrize(
    "structure",
    [
        [1, 2, 3],
        (1, [2, (3,)]),
        {"b": 1, "a": [2, 3]},
        Pair(1, Pair(2, 3)),
        OrderedDict(b=[1], a=(2, 3)),
        defaultdict(list, {"b": [1, 2], "a": [3]}),
        Named(b=1, a=Named(c=2, d=3)),
        UserDict({"b": 1, "a": UserDict({"c": 2, "d": 3})}),
    ],
    ids=lambda structure: type(structure).__name__,
)
def test_leaves_are_in_order_and_map_keeps_the_structure(structure):
    assert leaves_of(structure) == [1, 2, 3]
    mapped = map_leaves(lambda leaf: 10 * leaf, structure)
    assert leaves_of(mapped) == [10, 20, 30]
    if not isinstance(structure, Named | UserDict):
        assert type(mapped) is type(structure)


def test_anything_else_is_a_leaf():
    assert leaves_of("text") == ["text"]
    assert leaves_of(None) == [None]
    assert leaves_of([]) == []
