"""Differential fuzzing of `Balancer.backward`: random networks and steps against an explicit oracle."""

import gc
import itertools
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, reject, seed, settings

from tests.fuzz import oracle
from tests.fuzz.check import check, compare_gradients, prepared
from tests.fuzz.mutants import MUTANTS
from tests.fuzz.oracle import Unusable
from tests.fuzz.strategies import examples

FEW, MANY = 200, int(os.environ.get("FUZZ_EXAMPLES", "20000"))
EXPECTED_WARNINGS = (
    ".*cannot be batched",  # by the stage, which goes back to the loop
    "There is a performance drop",  # by torch, on the way there
    ".*ignores positive loss weights",
    "shared must hold parameters that several tasks reach",
    "grad and param do not obey the gradient layout contract",  # by torch, for a gradient that existed before
)
fixed = settings(
    max_examples=FEW,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in EXPECTED_WARNINGS]


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Undo `hide_objects`."""
    yield
    gc.unfreeze()


def hide_objects():
    """Hide all objects that exist from the stage, which looks through them at the first custom function of a graph."""
    gc.collect()
    gc.freeze()


COUNT = itertools.count()


def check_if_usable(example):
    if next(COUNT) % 500 == 0:
        hide_objects()
    try:
        check(example)
    except Unusable:
        reject()


@seed(0)
@fixed
@given(examples())
def test_step_is_what_explicit_formulas_say(example):
    check_if_usable(example)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(examples())
def test_step_is_what_explicit_formulas_say_many_times(example):
    check_if_usable(example)


@seed(0)
@settings(fixed, max_examples=60)
@given(examples())
def test_oracle_agrees_with_an_ordinary_backward_pass(example):
    """With all weights one, the formulas must give what ``losses.sum().backward()`` gives, whatever the hooks."""
    assume(example.network.is_linear())
    plain = example.call._replace(gradient="none", loss="ls", scaler=None, factor=None, given="dict", measure=None)
    example = example._replace(call=plain)
    try:
        expected = oracle.expect(example)
    except Unusable:
        reject()
    net, existing = prepared(example, expected.plan)
    torch.stack([net.losses[task].reshape(()) for task in expected.plan.tasks]).sum().backward()
    compare_gradients(example, expected, oracle.decide(example.call, expected, None), net, existing)


def passes(example):
    try:
        check(example)
    except Unusable:
        return False
    except Exception:  # noqa: BLE001 - a fault of the stage, which the other tests report
        return False
    return True


@pytest.fixture(scope="module")
def passing():
    """Fixed examples that pass."""
    found = []

    @seed(0)
    @settings(fixed, phases=[Phase.generate])
    @given(examples())
    def collect(example):
        found.append(example)

    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        collect()
        return [example for example in found if passes(example)]


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_detected(passing, name):
    for example in passing:
        applied = []

        def mutate(net, expected, report, applied=applied):
            damaged = MUTANTS[name](net, expected, report)
            applied.append(damaged is not None)
            return report if damaged is None else damaged

        try:
            check(example, mutate)
        except AssertionError:
            assert applied == [True]
            return
    pytest.fail(f"{name} is not detected by any of {len(passing)} examples")
