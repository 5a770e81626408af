import math

import pytest
import torch
from torch import nn

from balance import Splitter
from balance.rules.compose import every
from tests.splitter.views import TASKS, gradients, merged


def test_any_callable_and_wrapped_rules():
    J = gradients(0, 3)
    torch.testing.assert_close(merged(Splitter(TASKS, gradient=lambda G: torch.arange(3.0)), J), J[1] + 2 * J[2])
    splitter = Splitter(TASKS, gradient=every(2, "mgda", num_tasks=3))
    first = merged(splitter, J)
    torch.testing.assert_close(first, merged(Splitter(TASKS, gradient="mgda"), J))
    other = gradients(1, 3)
    weights = splitter.report.gradient_weights
    torch.testing.assert_close(merged(splitter, other), torch.einsum("k,kbf->bf", weights, other))  # kept


@pytest.mark.parametrize(
    ("splitter", "text"),
    [
        (lambda: Splitter(("a", "b")), "Splitter(('a', 'b'), gradient=normalized)"),
        (
            lambda: Splitter(("a", "b"), gradient="cagrad", gradient_options={"c": 0.9}, weights={"a": 1, "b": 5}),
            "Splitter(('a', 'b'), gradient=cagrad(c=0.9), weights={'a': 1.0, 'b': 5.0})",
        ),
        (
            lambda: Splitter(("a",), gradient=None, projection=1, beta=0.5),
            "Splitter(('a',), gradient=None, projection='after_norm', beta=0.5)",
        ),
        (
            lambda: Splitter(("a",), gradient=every(2, "mgda", num_tasks=1)),
            "Splitter(('a',), gradient=every(2, mgda))",
        ),
    ],
)
def test_repr(splitter, text):
    assert repr(splitter()) == text
    assert f"(0): {text}" in repr(nn.ModuleList([splitter()]))


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional argument"):
        Splitter(TASKS, "cagrad", {"c": 0.9})


def test_the_seed_reaches_rules_within_rules():
    J = gradients(0, 3)
    for seed in (0, 1):
        rule = every(1, "pcgrad", num_tasks=3)
        torch.testing.assert_close(
            merged(Splitter(TASKS, gradient=rule, seed=seed), J), merged(Splitter(TASKS, gradient="pcgrad", seed=seed), J)
        )


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "all distinct, but got", {"tasks": ("a", "a")}),
        (TypeError, "names or their number", {"tasks": "ab"}),
        (ValueError, "Did you mean 'mgda'", {"gradient": "mdga"}),
        (ValueError, "Did you mean 'normalized'", {"gradient": "normalised"}),
        (TypeError, "registered name or a callable", {"gradient": 3}),
        (ValueError, "Options are for registered names", {"gradient": torch.diagonal, "gradient_options": {"c": 1}}),
        (ValueError, "need a gradient balancer", {"gradient_options": {"c": 1}}),
        (ValueError, "has no option", {"gradient": "cagrad", "gradient_options": {"d": 1}}),
        (ValueError, "must not be negative", {"gradient": "cagrad", "gradient_options": {"c": -1.0}}),
        (ValueError, "sees no losses", {"gradient": "mgda", "gradient_options": {"normalization": "loss"}}),
        (ValueError, "sees no losses", {"gradient": lambda G, losses: losses}),
        (ValueError, "not negative", {"weights": (1, -1, 1)}),
        (ValueError, "not all zero", {"weights": (0, 0, 0)}),
        (ValueError, "finite", {"weights": (1, math.nan, 0)}),
        (ValueError, "for each of 3 tasks", {"weights": (1, 2)}),
        (ValueError, "none for b, c", {"weights": {"a": 1}}),
        (ValueError, "Unknown task in weights", {"weights": {"a": 1, "b": 1, "d": 1}}),
        (ValueError, "projection must be one of 'none', ", {"projection": 4}),
        (ValueError, "projection='shortest' is for two tasks, but got 3", {"projection": 2}),
        (ValueError, "projection='after_norm' is for gradient='normalized'", {"projection": 1, "gradient": "pcgrad"}),
        (ValueError, r"beta must be in 0..1", {"beta": 1.0}),
        (TypeError, "beta must be float", {"beta": "0.9"}),
        (TypeError, "must be a GradScaler", {"scaler": 65536.0}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        Splitter(**{"tasks": TASKS} | arguments)


@pytest.mark.parametrize(
    ("error", "message", "features"),
    [
        (TypeError, "must be floats, but got torch.int64", torch.arange(3)),
        (TypeError, "must be floats, but got torch.complex64", [torch.zeros(2, dtype=torch.complex64)]),
        (TypeError, "but got str", {"a": "b"}),
        (TypeError, "but got NoneType", None),
        (ValueError, "at least one tensor", ()),
        (ValueError, r"sizes \[2, 3\]", [torch.zeros(2, 1, requires_grad=True), torch.zeros(3, 1, requires_grad=True)]),
    ],
)
def test_bad_features(error, message, features):
    with pytest.raises(error, match=message):
        Splitter(TASKS)(features)


def test_a_rule_needs_no_samples():
    x, y = (torch.zeros(n, 1, requires_grad=True) for n in (2, 3))
    views = Splitter(2, gradient="mgda")([x, y])
    sum(v.sum() * (k + 1) for k, view in enumerate(views.values()) for v in view).backward()
    assert (x.grad == 1).all()
    assert (y.grad == 1).all()


@pytest.mark.parametrize("found", [torch.ones(2), torch.full((3,), math.nan), 1.0], ids=str)
def test_bad_weights_of_a_callable(found):
    with pytest.raises(ValueError, match="must return 3 finite weights"):
        merged(Splitter(TASKS, gradient=lambda G: found), gradients(0, 3))
