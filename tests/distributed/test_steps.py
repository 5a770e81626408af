"""Several processes make the steps of one process with the whole batch."""

import itertools

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from balance import Balancer, compose
from tests.distributed.processes import run_on_ranks
from tests.distributed.training import TASKS, Case, Net, losses_of, run_cases, samples_of, train

BATCHES = ("equal", "unequal", "alternating", "disjoint")
FAST = (
    Case({"gradient": "pcgrad"}, batches="alternating"),
    Case({"gradient": "nashmtl", "scale": "norm"}, batches="unequal", wrap={"gradient_as_bucket_view": True}),
    Case({"gradient": "cagrad", "loss": "famo"}, batches="disjoint", wrap={"find_unused_parameters": True}),
    Case({"gradient": "mgda", "loss": "go4align"}, wrap=None),
    Case({"gradient": "mgda", "source": "features"}, batches="alternating"),
    Case({"gradient": "imtl", "memory": "gramian"}, batches="unequal", checkpointed=True),
    Case({"gradient": "graddrop"}, batches="alternating"),
    Case({"loss": "uw"}, batches="disjoint"),
    Case({"gradient": "nashmtl"}, arguments=("measure", "extra")),
    Case({"gradient": "cagrad", "loss": "uw"}, collect=3, batches="unequal"),
    Case({"loss": "famo"}, collect=2, batches="alternating"),
    Case({"gradient": "mgda", "loss": "uw"}, dtype=torch.float32),
    Case({"gradient": "pcgrad"}, batches="alternating", arguments=("metric",)),
    Case({"gradient": "imtl"}, batches="unequal", arguments=("metric",), collect=2),
    Case({"loss": "coba", "loss_options": {"warmup": 2}}, batches="alternating"),
    Case({"gradient": "mgda", "loss": "famo", "loss_options": {"optimizer": "user"}}, batches="unequal"),
)
SLOW = (
    Case({"gradient": "pcgrad"}, wrap={"static_graph": True}, inner=True),
    Case({"loss": "famo"}, batches="alternating", wrap={"find_unused_parameters": True}),
    Case({"loss": "dwa"}, wrap={"static_graph": True}, batches="unequal"),
    Case({"loss": "go4align"}, wrap=None),
    Case({"loss": "uw"}, arguments=("extra",), batches="alternating"),
    Case({"gradient": "mgda", "source": "features"}, collect=2),
)
REFUSED = {
    "All ranks must have the same parameters": Case({"gradient": "pcgrad"}, wrap=None, batches="alternating"),
    "Call the module inside of it": Case({"gradient": "pcgrad"}, wrap={"static_graph": True}),
    "all tasks must be present at every step": Case({"loss": "uw"}, wrap={"static_graph": True}, batches="alternating"),
    "the samples of all ranks in one place": Case({"gradient": "graddrop", "source": "features"}),
    "do not come from the forward pass of the wrapper": Case({"loss": "uw"}, inner=True),
}


def matrix():
    """Every engine, loss balancer, gradient balancer and way to share a batch that go together."""
    yield from (*FAST, *SLOW)
    engines = ({}, {"engine": "batched"}, {"memory": "gramian"}, {"source": "features"})
    losses = ("ls", "uw", "famo", "go4align", "dwa")
    for loss, gradient, batches in itertools.product(losses, (None, "mgda", "pcgrad", "nashmtl", "cagrad"), BATCHES):
        for engine in engines if gradient else ({},):
            yield Case({"loss": loss, "gradient": gradient, **engine}, batches=batches)
    wraps = ({"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-4})
    for wrap, gradient, batches in itertools.product(wraps, (None, "mgda", "pcgrad", "nashmtl", "cagrad"), BATCHES):
        yield Case({"gradient": gradient}, batches=batches, wrap=wrap)
    for gradient, batches in itertools.product((None, "mgda", "pcgrad", "nashmtl", "cagrad", "graddrop"), BATCHES):
        yield Case({"gradient": gradient}, batches=batches, collect=3)


def assert_equal_to_one(case, results):
    """Ranks are bit-equal, and equal one process with the whole batch, to rounding."""
    first, *others = results
    assert not isinstance(first, str), (case, first)
    for other in others:
        for mine, theirs in zip(tensors(first), tensors(other), strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine.nan_to_num(), theirs.nan_to_num()), case
    alone = train(case, share=len(results))
    rtol = 1e-11 if case.dtype == torch.float64 else 2e-6
    for mine, theirs in zip(tensors(first), tensors(alone), strict=True):
        assert (mine is None) == (theirs is None), case
        if mine is not None:
            scale = float(theirs.double().nan_to_num().abs().max()) if theirs.numel() else 1.0
            torch.testing.assert_close(
                mine.double(), theirs.double(), rtol=rtol, atol=rtol * scale, equal_nan=True, msg=lambda text: f"{case}: {text}"
            )


def tensors(result):
    for losses, weights, gradients in result["reports"]:
        yield losses
        yield weights
        yield from gradients
    yield from result["parameters"]
    for value in result["state"].values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def not_a_number(rank):
    """A loss of NaN on one rank stops all ranks, changes nothing, and the next step runs; a scaler skips it on all ranks."""
    torch.manual_seed(0)
    inner = Net().double()
    model, x = DistributedDataParallel(inner), torch.randn(6, 5, dtype=torch.float64)
    outcomes = []
    rows = dict.fromkeys(TASKS, torch.arange(6))
    for options in ({"gradient": "nashmtl"}, {"loss": "famo"}):
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
            balancer, optimizer = Balancer(TASKS, **options), torch.optim.SGD(inner.parameters(), lr=0.1)
            for bad in (True, False):
                optimizer.zero_grad()
                before = [p.detach().clone() for p in inner.parameters()]
                losses, _, _ = losses_of(model, x, rows)
                losses["b"] = losses["b"] * (float("nan") if bad and rank else 1.0)
                try:
                    balancer.backward(losses, shared=inner.trunk.parameters(), scaler=scaler)
                    outcome = "ran"
                except ValueError as error:
                    outcome = f"{error}"
                    assert all(p.grad is None for p in inner.parameters())
                if scaler is not None:
                    scaler.step(optimizer)
                    scaler.update()
                    outcome += (
                        " and moved" if any((p != b).any() for p, b in zip(inner.parameters(), before, strict=True)) else ""
                    )
                outcomes.append(outcome)
    return outcomes


IDLE = ({"gradient": "pcgrad"}, {"loss": "uw"})


def idle_rank(rank):
    """Gradients where one rank has no loss at all."""
    results = []
    for options in IDLE:
        torch.manual_seed(0)
        inner = Net().double()
        model, x = DistributedDataParallel(inner), torch.ones(6, 5, dtype=torch.float64)
        losses, _, _ = losses_of(model, x, dict.fromkeys(TASKS, torch.arange(6)))
        Balancer(TASKS, **options).backward({} if rank else losses, shared=inner.trunk.parameters())
        results.append([p.grad for p in inner.parameters()])
    return results


def accumulation(rank):
    """Two micro-batches, the first without synchronisation, by DistributedDataParallel with weights of a loss balancer."""
    torch.manual_seed(0)
    inner = Net().double()
    model = DistributedDataParallel(inner)
    balancer = Balancer(TASKS)
    rows = dict.fromkeys(TASKS, torch.arange(3))
    parts = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[6 * rank : 6 * rank + 6].split(
        3
    )
    with model.no_sync():
        balancer.backward(losses_of(model, parts[0], rows)[0], factor=0.5)
    balancer.backward(losses_of(model, parts[1], rows)[0], factor=0.5)
    return [p.grad for p in inner.parameters()]


def reused_weights(rank):
    """Weights of every second step, with ordinary steps between the balanced ones."""
    torch.manual_seed(0)
    inner = Net().double()
    inner.unused.requires_grad_(False)  # an ordinary step needs all parameters
    model = DistributedDataParallel(inner)
    balancer = Balancer(TASKS, gradient=compose.every(2, "nashmtl", len(TASKS)))
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(24, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        rows = samples_of(Case({}), step, rank, distributed.get_world_size())
        losses, _, _ = losses_of(model, x, rows)
        if step % 3 == 2:
            sum(losses.values()).backward()
        else:
            balancer.backward(losses, shared=inner.trunk.parameters())
        optimizer.step()
    return [p.detach() for p in inner.parameters()]


def collectives(rank):
    """Numbers in each collective of the balancer, in a step without a gradient balancer."""
    sizes, real = [], distributed.all_reduce

    def counting(tensor, *arguments, **keywords):
        sizes.append(tensor.numel())
        return real(tensor, *arguments, **keywords)

    model, balancer = DistributedDataParallel(nn.Linear(3, len(TASKS))), Balancer(TASKS, loss="uw")
    for step in range(2):  # the first one also checks the wrapper
        distributed.all_reduce = counting if step else real
        balancer.backward(model(torch.ones(2, 3)).mean(0))
    distributed.all_reduce = real
    return sizes


def deferred(rank):
    """Gradients by the backward pass of a scalar, and by ordinary calls."""
    results = []
    for options in ({"gradient": "nashmtl"}, {"loss": "uw"}):
        for is_deferred in (True, False):
            torch.manual_seed(0)
            inner = Net().double()
            model, balancer = DistributedDataParallel(inner), Balancer(TASKS, **options)
            rows = dict.fromkeys(TASKS, torch.arange(3 + rank))
            x = torch.randn(3 + rank, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            losses, counts, _ = losses_of(model, x, rows)
            if is_deferred:
                (0.5 * balancer.loss(losses, shared=inner.trunk.parameters(), counts=counts)).backward()
            else:
                balancer.backward(losses, shared=inner.trunk.parameters(), counts=counts, factor=0.5)
            results.append([p.grad for p in inner.parameters()])
    return results


def wrapped_balancer(rank):
    model, balancer = nn.ModuleDict({"net": nn.Linear(3, len(TASKS))}), Balancer(TASKS, loss="uw")
    model["balancer"] = balancer
    _wrapper = DistributedDataParallel(model)
    try:
        balancer.backward(model["net"](torch.ones(2, 3)).mean(0))
    except RuntimeError as error:
        return str(error)
    return "accepted"


def everything(rank, cases, ranks):
    checks = (not_a_number, idle_rank, accumulation, reused_weights, collectives, deferred, wrapped_balancer)
    return run_cases(rank, cases, ranks), {check.__name__: check(rank) for check in checks}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    cases = [*FAST, *REFUSED.values()]
    results = run_on_ranks(everything, 2, tmp_path_factory.mktemp("ranks"), cases, 2)
    return {id(case): [trained[i] for trained, _ in results] for i, case in enumerate(cases)}, [checks for _, checks in results]


@pytest.mark.parametrize("case", FAST, ids=[str(i) for i in range(len(FAST))])
def test_two_ranks_make_the_steps_of_one_process(two_ranks, case):
    assert_equal_to_one(case, two_ranks[0][id(case)])


@pytest.mark.parametrize("message", REFUSED)
def test_all_ranks_refuse_what_cannot_be_exact(two_ranks, message):
    first, second = two_ranks[0][id(REFUSED[message])]
    assert message in first
    assert message in second


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_ranks(two_ranks):
    first, second = (checks["not_a_number"] for checks in two_ranks[1])
    assert first == second
    refused, ran, skipped, moved = first[:4]
    assert "Losses must be finite, but got {'b': nan}" in refused
    assert (ran, skipped, moved) == ("ran", "ran", "ran and moved")
    assert first[4:] == first[:4]


def test_a_rank_without_any_loss_gets_the_gradients_of_the_others(two_ranks):
    for options, first, second in zip(IDLE, *(checks["idle_rank"] for checks in two_ranks[1]), strict=True):
        torch.manual_seed(0)
        alone = Net().double()
        losses, _, _ = losses_of(alone, torch.ones(6, 5, dtype=torch.float64), dict.fromkeys(TASKS, torch.arange(6)))
        Balancer(TASKS, **options).backward(losses, shared=alone.trunk.parameters())
        for mine, theirs, parameter in zip(first, second, alone.parameters(), strict=True):
            assert (mine is None) == (theirs is None) == (parameter.grad is None)
            if mine is not None:
                assert torch.equal(mine, theirs)
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


def test_accumulation_without_synchronisation(two_ranks):
    first, second = (checks["accumulation"] for checks in two_ranks[1])
    torch.manual_seed(0)
    alone = Net().double()
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sum(losses_of(alone, x, dict.fromkeys(TASKS, torch.arange(12)))[0].values()).backward()
    for mine, theirs, parameter in zip(first, second, alone.parameters(), strict=True):
        if parameter.grad is not None:
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-14)


def test_ordinary_steps_between_balanced_ones(two_ranks):
    first, second = (checks["reused_weights"] for checks in two_ranks[1])
    alone = alone_with_reused_weights()
    for mine, theirs, parameter in zip(first, second, alone, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, parameter, rtol=1e-11, atol=1e-13)


def alone_with_reused_weights():
    torch.manual_seed(0)
    model = Net().double()
    balancer, optimizer = (
        Balancer(TASKS, gradient=compose.every(2, "nashmtl", len(TASKS))),
        torch.optim.SGD(model.parameters(), lr=0.05),
    )
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(24, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        losses, _, _ = losses_of(model, x, dict.fromkeys(TASKS, torch.arange(24)))
        if step % 3 == 2:
            sum(losses.values()).backward()
        else:
            balancer.backward(losses, shared=model.trunk.parameters())
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_a_loss_balancer_costs_one_small_all_reduce(two_ranks):
    for checks in two_ranks[1]:
        (size,) = checks["collectives"]
        assert size == 3 * len(TASKS) + 7  # sums, counts and presence by task, and facts that ranks agree on


def test_the_backward_pass_of_a_scalar_is_the_step_of_all_ranks(two_ranks):
    first, second = (checks["deferred"] for checks in two_ranks[1])
    for mine, theirs in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    for scalar, call in ((first[0], first[1]), (first[2], first[3])):
        for mine, theirs in zip(scalar, call, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_a_balancer_inside_of_the_wrapper_is_refused(two_ranks):
    for checks in two_ranks[1]:
        assert "must not be part of the model that DistributedDataParallel wraps" in checks["wrapped_balancer"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*ignores positive loss weights")
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_whole_matrix(tmp_path, ranks):
    cases = list(matrix())
    results = run_on_ranks(run_cases, ranks, tmp_path, cases, ranks)
    for i, case in enumerate(cases):
        assert_equal_to_one(case, [result[i] for result in results])
