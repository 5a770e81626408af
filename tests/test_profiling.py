"""Memory is checked to 1 KiB: loss values and the like are tensors too."""

from threading import Event, Thread

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

from balance import profiling as cost
from balance.profiling import Cost, measure, peak_memory

MIB = 2**20
KIB = 2**10


def block(mib=8):
    return torch.zeros(mib * MIB, dtype=torch.uint8)


def one():
    block()


def two_at_once():
    first, second = block(), block()
    del first, second


def one_after_the_other():
    for _ in range(3):
        tensor = block()
        del tensor


def frees_in_between():
    first, second = block(8), block(4)
    del first
    third = block(6)  # 4 and 6 are less than 8 and 4
    del second, third


def kept_by_views():
    middle = block()[10:20]
    tensor = block()
    del middle, tensor


def grows():
    tensor = block(2)
    tensor.resize_(8 * MIB)


@pytest.mark.parametrize(
    ("step", "mib"),
    [
        (one, 8),
        (two_at_once, 16),
        (one_after_the_other, 8),
        (frees_in_between, 12),
        (kept_by_views, 16),
        (grows, 8),
        (lambda: None, 0),
    ],
)
def test_known_allocations(step, mib):
    assert peak_memory(step) == pytest.approx(mib * MIB, abs=KIB)


def test_what_existed_before_does_not_count():
    there = block()
    assert peak_memory(lambda: there.add_(1)[3:].view(-1)) <= KIB


def test_a_tensor_of_before_that_is_released_makes_room():
    held = [block(8)]

    def step():
        held[0].add_(1)
        held.clear()
        block(8)

    assert peak_memory(step) <= KIB


def test_a_backward_pass():
    weight, factors = torch.ones(MIB, requires_grad=True), torch.ones(MIB)  # 4 MiB each

    def step():
        product = weight * factors  # alive until the gradient is there
        product.sum().backward()
        weight.grad = None

    assert peak_memory(step) == pytest.approx(8 * MIB, abs=KIB)


@pytest.mark.parametrize("optimize", [False, True], ids=["backward", "adam"])
def test_the_allocator_says_the_same(optimize, capfd):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 5))
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.randn(16, 3, 16, 16)

    def step():
        model(images).square().mean().backward()
        if optimize:
            optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step()
    capfd.readouterr()  # the profiler prints
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 200 * KIB
    assert peak_memory(step) == pytest.approx(peak, abs=KIB)


def test_sparse_gradients():
    table = nn.Embedding(100_000, 8, sparse=True)

    def step():
        table(torch.arange(1000)).sum().backward()
        table.zero_grad()

    assert 32_000 <= peak_memory(step) <= 4 * 32_000  # the table has 3 200 000 bytes


def test_exactly_one_call():
    calls = []
    peak_memory(lambda: calls.append(1))
    assert calls == [1]


def test_threads_count_their_own():
    peaks = {}

    def work(mib):
        peaks[mib] = [peak_memory(lambda: block(mib)) for _ in range(5)]

    threads = [Thread(target=work, args=(mib,)) for mib in (1, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mib in (1, 2, 4):
        assert peaks[mib] == pytest.approx([mib * MIB] * 5, abs=KIB)


def test_threads_that_overlap_leave_nothing_switched_on():
    second_inside, first_done = Event(), Event()

    def first():
        peak_memory(lambda: second_inside.wait(0.1))
        first_done.set()

    def second():
        peak_memory(lambda: (second_inside.set(), first_done.wait(1)))

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not _python_dispatch.is_in_torch_dispatch_mode()  # torch.compile asks that


def test_nested():
    inner = []

    def step():
        tensor = block(2)
        inner.append(peak_memory(one))
        del tensor

    assert peak_memory(step) == pytest.approx(10 * MIB, abs=KIB)
    assert inner == pytest.approx([8 * MIB], abs=KIB)


def test_what_a_step_raises_is_passed_on_and_nothing_stays_switched_on():
    def step():
        block()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_memory(step)
    assert not _python_dispatch.is_in_torch_dispatch_mode()
    assert peak_memory(one) == pytest.approx(8 * MIB, abs=KIB)


def test_nothing_is_printed(capfd):
    measure(one)
    assert capfd.readouterr() == ("", "")


class Clock:
    """Time passes within a step only, by the next of the given durations."""

    def __init__(self, durations):
        self.durations = iter(durations)
        self.now = 0.0
        self.calls = 0

    def perf_counter(self):
        return self.now

    def step(self):
        self.now += next(self.durations, 0.0)
        self.calls += 1


@pytest.mark.parametrize(
    ("limits", "seconds", "calls"),
    [
        ({"repeats": 3, "budget": 100}, 3, 5),  # of 1, 5, 3, after 9 to warm up; one more for the memory
        ({"repeats": 4, "budget": 6}, 3, 4),  # 1 and 5 use the budget
        ({"repeats": 4, "budget": 0}, 1, 3),
        ({"repeats": 1, "budget": 100}, 1, 3),
    ],
)
def test_median_seconds_and_number_of_calls(limits, seconds, calls, monkeypatch):
    clock = Clock([9, 1, 5, 3])
    monkeypatch.setattr(cost, "time", clock)
    assert measure(clock.step, **limits) == Cost(seconds, 0)
    assert clock.calls == calls


def test_measure_has_time_and_memory():
    cost = measure(one)
    assert cost.seconds > 0
    assert cost.bytes == pytest.approx(8 * MIB, abs=KIB)


@pytest.mark.parametrize("limits", [{"repeats": 0}, {"budget": -1}, {"budget": float("nan")}])
def test_limits_out_of_range(limits):
    with pytest.raises(ValueError, match="repeats must be at least 1 and budget at least 0 seconds"):
        measure(one, **limits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_known_allocations_on_cuda():
    def step():
        tensors = [torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2)]
        del tensors

    there = torch.zeros(32 * MIB, dtype=torch.uint8, device="cuda")
    assert peak_memory(step, "cuda") == pytest.approx(16 * MIB, abs=KIB)
    assert measure(step, device="cuda").bytes == pytest.approx(16 * MIB, abs=KIB)
    del there
