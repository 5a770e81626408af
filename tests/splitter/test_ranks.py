"""The splitter on several processes, next to one process with the whole batch."""

import copy
import math
from itertools import product

import pytest
import torch
from torch import distributed

from balance import Splitter
from tests.distributed.processes import run_on_ranks
from tests.splitter.training import TINY, UNUSED, Case, train
from tests.splitter.views import gradients, merged

MODES = [
    {},
    {"gradient": None},
    {"projection": 1, "weights": (1, 2, 3)},
    {"projection": 3},
    *({"gradient": name} for name in ("pcgrad", "nashmtl", "mgda", "imtl", "cagrad", "every")),
]
WRAPS = [{}, UNUSED, {"static_graph": True, **TINY}, {"gradient_as_bucket_view": True, **TINY}]
REENTRANT = ("reentrant", "reentrant splitter")
LACKING = ("absent", "alternating", "nowhere", "disjoint", "unlabelled")  # tasks
FEW = [
    Case(wrap=TINY, batches="unequal"),
    Case({"gradient": "pcgrad"}, UNUSED, "alternating"),
    Case({"gradient": "nashmtl"}, {"static_graph": True}, checkpointed="reentrant"),
    Case({"gradient": "mgda"}, {"static_graph": True}, "unequal", checkpointed="reentrant splitter"),
    Case({"projection": 1}, UNUSED, "unlabelled", "no_sync"),
]
MATRIX = [
    *(Case(mode, wrap, batches) for mode, wrap, batches in product(MODES, WRAPS, ("equal", "unequal"))),
    *(Case(mode, UNUSED, batches) for mode, batches in product(MODES, LACKING)),
    *(Case(mode, UNUSED, "alternating", accumulation) for mode, accumulation in product(MODES, ("sync", "no_sync"))),
    *(Case(mode, wrap, "unequal", "no_sync") for mode, wrap in product(MODES, (WRAPS[0], WRAPS[3]))),
    *(Case(mode, wrap, "unequal", None, place) for mode, wrap, place in product(MODES, WRAPS, ("trunk", "splitter"))),
    *(
        Case(mode, {"static_graph": True}, "unequal", None, f"reentrant{place}")
        for mode in MODES
        for place in ("", " splitter")
    ),
]
SHARDED = [
    Case(mode, "shards", batches, None, place)
    for mode, batches, place in product(MODES, ("equal", "unequal"), ("", "trunk", "splitter"))
]


def train_all(rank, cases):
    return [train(case, rank) for case in cases]


def check(cases, by_rank):
    """Compare the ranks with each other, bit for bit, and with one process."""
    for case, first, second in zip(cases, *by_rank, strict=True):
        alone = train(case)
        for key in ("weights", "parameters", "state"):
            torch.testing.assert_close(
                second[key], first[key], rtol=0, atol=0, equal_nan=True, msg=lambda m, c=case: f"{c}: {m}"
            )
            torch.testing.assert_close(
                first[key], alone[key], rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m, c=case, k=key: f"{c}, {k}: {m}"
            )


def run_without_model(rank):
    """A refused rule, a task that only one rank has, a gradient that is not finite on one rank, and separate groups."""
    results = {}
    with pytest.raises(RuntimeError) as refusal:
        merged(Splitter(2, gradient="graddrop"), gradients(0, 2))
    results["refusal"] = str(refusal.value)
    J = gradients(rank, 2)
    results["gradients"] = J
    results["on one rank"] = merged(Splitter(2, gradient="mgda"), [J[0], J[1] if rank else None])
    splitter = Splitter(2)
    results["not finite"] = merged(splitter, J * (math.inf if rank else 1)), splitter.counts
    groups = [distributed.new_group([r]) for r in range(2)]
    alone = Splitter(2, gradient="mgda", process_group=groups[rank])
    results["alone"] = [merged(splitter, J) for splitter in (alone, copy.deepcopy(alone))]
    return results


def run_few(rank):
    return train_all(rank, FEW), run_without_model(rank)


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    trained, others = zip(*run_on_ranks(run_few, 2, tmp_path), strict=True)
    check(FEW, trained)
    left, right = others
    assert "torch.distributed runs 2" in left["refusal"]
    assert left["not finite"][0].isnan().all()
    assert left["not finite"][1].tolist() == [0, 0]
    J, Q = left["gradients"], right["gradients"]
    whole = torch.cat([torch.stack([J[0], torch.zeros_like(J[0])]), Q], dim=1) / 2  # each rank's loss counts half
    found = torch.cat([left["on one rank"], right["on one rank"]]) / 2
    torch.testing.assert_close(found, merged(Splitter(2, gradient="mgda"), whole))
    for results in others:
        expected = merged(Splitter(2, gradient="mgda"), results["gradients"])
        for direction in results["alone"]:
            torch.testing.assert_close(direction, expected)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [MATRIX, SHARDED], ids=["data parallel", "sharded"])
def test_every_way_to_train_on_two_processes(cases, tmp_path):
    check(cases, run_on_ranks(train_all, 2, tmp_path, cases))
