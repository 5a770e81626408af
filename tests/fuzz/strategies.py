"""Hypothesis strategies of random networks and of the ways to call the stage."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from hypothesis import strategies as st

import balance
from tests.fuzz.functions import HOOKS, LINEAR, Hook
from tests.fuzz.networks import TASKS, Network, Op, Task
from tests.fuzz.operations import OPERATIONS, TWICE, VARIANTS

RULES = ("ones", "fixed", "smooth", "mgda", "pcgrad", "cagrad", "imtl", "nashmtl", "graddrop", "none")
HAS_FACTOR = "factor" in inspect.signature(balance.Balancer.backward).parameters
LOSS_RULES = ("ls", "scaleinvls", "uw", "coupled")


class Call(NamedTuple):
    """Description of a stage and of its one step."""

    engine: str = "loop"
    memory: str = "jacobian"
    matrix: bool = True  # few gradients are kept in one matrix
    source: str = "parameters"
    hint: str = "none"  # features: "none", "z", "first" of them, "inner", "nested"
    measure: frozenset[int] | None = None  # places among the shared parameters
    gradient: str = "ones"
    loss: str = "ls"
    heads: str | None = None
    scale: str = "paper"
    scaler: float | None = None
    factor: float | None = None
    given: str = "dict"  # how the losses are given: "dict", "stack" or "vector"
    excluded: frozenset[int] = frozenset()  # places among the parameters of the trunk that are not declared shared
    extra: frozenset[int] = frozenset()  # places among the parameters of the heads that are
    reverse: bool = False  # order of the shared parameters
    declare: bool = True  # give shared also with source="features"
    later: frozenset[int] = frozenset()  # places of parameters that are frozen after the forward pass
    existing: frozenset[int] = frozenset()  # those that have a gradient already
    leaf_hooks: tuple[tuple[int, int], ...] = ()  # places, and functions of hooks on parameters
    no_grad: bool = False  # the stage is called inside torch.no_grad()
    warm: bool = False  # the stage has made a step on another network before


class Example(NamedTuple):
    """One example."""

    network: Network
    call: Call


PLACES = st.integers(0, 15)
FEW = st.one_of(st.just(frozenset()), st.frozensets(PLACES, max_size=3))
MANY = st.one_of(st.just(frozenset()), st.frozensets(PLACES, max_size=8))


def rarely(value, otherwise=None, odds=3):
    """Draw from ``value`` in one case of ``odds + 1``."""
    return st.integers(0, odds).flatmap(lambda n: value if n == odds else st.just(otherwise))


def hooks(kinds, factors, odds=3):
    return rarely(st.builds(Hook, st.sampled_from(kinds), st.integers(0, factors - 1)), odds=odds)


def operations(kinds, factors):
    return st.builds(Op, st.sampled_from(kinds), st.integers(0, VARIANTS - 1), hooks(HOOKS, factors))


@st.composite
def tasks(draw, kinds, factors):
    kind = draw(st.sampled_from(kinds))
    ops = () if kind in ("constant", "same", "leaf", "direct") else draw(_heads(kind, factors))
    return Task(
        kind,
        ops,
        taps=draw(st.integers(1, 3)),
        form=draw(st.integers(0, 3)),
        size=draw(st.sampled_from((0, 0, 1, -2))),
        hook=draw(hooks(("tensor", "pre", "post"), factors, odds=7)),
        float32=draw(rarely(st.just(True), otherwise=False, odds=15)),
        shape=draw(st.sampled_from(((), (), (1,), (1, 1)))),
    )


def _heads(kind, factors):
    return st.lists(operations(TWICE if kind == "penalty" else tuple(OPERATIONS), factors), max_size=2).map(tuple)


def _rule_choices(draw, nonlinear):
    """Draw the rules and what goes with them."""
    gradient = draw(st.sampled_from(RULES))
    sees_jacobian = gradient == "graddrop"
    memory = "jacobian" if sees_jacobian or nonlinear else draw(st.sampled_from(("jacobian", "gramian")))
    return {
        "gradient": gradient,
        "memory": memory,
        "engine": draw(st.sampled_from(("loop", "batched", "auto"))),
        "matrix": draw(st.booleans()),
        "heads": draw(st.sampled_from((None, "unweighted") if sees_jacobian else (None, "weighted", "unweighted"))),
        "scale": draw(st.sampled_from(("paper", "norm") if sees_jacobian else ("paper", "norm", "sum"))),
    }


@st.composite
def examples(draw):
    nonlinear = draw(rarely(st.just(True), otherwise=False, odds=7))
    factors = LINEAR + 1 if nonlinear else LINEAR
    rules = _rule_choices(draw, nonlinear)
    if nonlinear and rules["gradient"] == "none":
        rules["gradient"] = "ones"
    source = "parameters" if nonlinear else draw(st.sampled_from(("parameters", "parameters", "features")))
    bypass = source == "parameters" and draw(st.booleans())
    kinds = ["normal"] * 6 + ["detached", "constant", "absent", "penalty", "same", "leaf", *(["direct"] if bypass else [])]
    first = draw(tasks(("normal",), factors))
    others = draw(st.lists(tasks(kinds, factors), max_size=len(TASKS) - 1))
    network = draw(networks((first, *others), factors, bypass=bypass))
    call = draw(calls(rules, source, network, nonlinear=nonlinear))
    return Example(network, call)


@st.composite
def networks(draw, heads, factors, *, bypass):
    trunk = tuple(draw(st.lists(operations(tuple(OPERATIONS), factors), min_size=1, max_size=5)))
    kind = draw(rarely(st.sampled_from(("checkpoint", "saved"))))
    start = draw(st.integers(0, len(trunk) - 1)) if kind else 0
    stop = draw(st.integers(start, len(trunk) - 1)) if kind else 0
    if any(op.kind == "vmapped" and op.variant > 5 for op in trunk[start : stop + 1]):
        kind = None  # torch.func.grad does not go with hooks on saved tensors
    return Network(
        seed=draw(st.integers(0, 2**16)),
        batch=draw(st.sampled_from((3, 5))),
        width=draw(st.sampled_from((4, 8))),
        trunk=trunk,
        tasks=heads,
        outputs=draw(st.sampled_from(("one", "one", "two", "chunk"))),
        feature_hooks=draw(st.tuples(*[hooks(("tensor", "pre", "post", "module", "retain"), factors)] * 2)),
        segment=(kind, start, stop) if kind else None,
        frozen=draw(FEW),
        strided=draw(FEW),
        input_grad=draw(rarely(st.just(True), otherwise=False)),
        bypass=bypass,
    )


@st.composite
def calls(draw, rules, source, network, *, nonlinear):
    kinds = {task.kind for task in network.tasks}
    all_present = "absent" not in kinds
    all_reach = kinds <= {"normal", "penalty", "same"}
    free = source == "parameters" and not nonlinear
    measured = free and rules["gradient"] not in ("graddrop", "none")
    return Call(
        **rules,
        source=source,
        hint=draw(st.sampled_from(("none", "z", "z", "first", "inner", "nested"))),
        measure=draw(rarely(st.frozensets(PLACES, min_size=1, max_size=4))) if measured else None,
        loss="ls" if nonlinear else draw(st.sampled_from(LOSS_RULES)),
        scaler=None if nonlinear else draw(rarely(st.just(8.0))),
        given=draw(st.sampled_from(("dict", "dict", *(["stack"] if all_present else []), *(["vector"] if all_reach else [])))),
        excluded=draw(FEW),
        extra=draw(FEW) if source == "parameters" else frozenset(),
        reverse=draw(st.booleans()),
        declare=draw(st.booleans()),
        later=frozenset() if network.segment and network.segment[0] == "checkpoint" else draw(FEW),
        existing=draw(MANY),
        leaf_hooks=tuple(draw(st.lists(st.tuples(PLACES, st.integers(0, LINEAR)), max_size=3))),
        no_grad=draw(rarely(st.just(True), otherwise=False, odds=15)),
        factor=draw(rarely(st.just(0.25))) if HAS_FACTOR and not nonlinear else None,
        warm=draw(rarely(st.just(True), otherwise=False, odds=7)) and rules["gradient"] not in ("pcgrad", "graddrop"),
    )
