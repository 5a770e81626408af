"""Wrappers of a model, found by its parameters; and process groups of some processes."""

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from balance import Balancer
from balance.distributed.ranks import Ranks
from balance.distributed.wrappers import is_inside_forward, read_model
from tests.distributed.processes import run_on_ranks


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_parameters_of_a_wrapper_come_in_its_order(one_process):
    model = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 1)})
    wrapper, free = DistributedDataParallel(model), nn.Parameter(torch.zeros(4))
    reached = read_model([model["a"].weight, free])
    assert reached.wrappers == [wrapper]
    assert [id(p) for p in reached.parameters] == [id(p) for p in (*model.parameters(), free)]
    assert (reached.num_free, reached.is_wrapped, reached.order_is_known) == (1, False, False)
    whole = read_model([model["a"].weight])
    assert (whole.is_wrapped, whole.order_is_known) == (True, True)
    assert [id(p) for p in whole.heads([model["b"].weight])] == [id(model["b"].bias), *map(id, model["a"].parameters())]
    assert reached.layout != whole.layout


def test_frozen_parameters_of_a_wrapper_are_left_out(one_process):
    model = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 1)})
    _wrapper = DistributedDataParallel(model)
    model["b"].requires_grad_(False)
    assert len(read_model([model["a"].weight]).parameters) == 2


def test_parameters_that_a_wrapper_ignores_belong_to_no_wrapper(one_process):
    model = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 1)})
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["a.weight"])
    wrapper = DistributedDataParallel(model)
    reached = read_model([model["a"].weight, model["a"].bias])
    assert (reached.wrappers, reached.num_free) == ([wrapper], 1)
    expected = [*model["b"].parameters(), model["a"].bias, model["a"].weight]
    assert list(map(id, reached.parameters)) == list(map(id, expected))
    assert read_model([model["a"].bias]).is_wrapped


def test_the_forward_pass_of_a_wrapper_is_recognised(one_process):
    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x), is_inside_forward()

    assert DistributedDataParallel(Asks(2, 3))(torch.zeros(1, 2))[1]
    assert not Asks(2, 3)(torch.zeros(1, 2))[1]


class TrainsItself(nn.Module):
    """A module whose forward pass returns the loss of a step, or takes the step."""

    def __init__(self, options, *, is_direct):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.unused = nn.Linear(3, 4).double(), nn.Linear(2, 2).double()
        self.balancer = Balancer(4, **options)
        self.is_direct = is_direct

    def forward(self, x):
        given = {"losses": self.trunk(x).square().mean(0), "shared": self.trunk.parameters()}
        return self.balancer.backward(**given) if self.is_direct else self.balancer.loss(**given)


def losses_inside_forward(rank, ranks, cases):
    results = []
    for options, wrap, is_direct in cases:
        module = TrainsItself(options, is_direct=is_direct)
        own = (*module.balancer.named_parameters("balancer"), *module.balancer.named_buffers("balancer"))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [name for name, _ in own])
        model = module if ranks == 1 else DistributedDataParallel(module, **wrap)
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x if ranks == 1 else x[3 * rank : 3 * rank + 3])
            if not is_direct:
                loss.backward()
            optimizer.step()
        results.append([p.detach().clone() for p in module.parameters()])
    return results


@pytest.mark.slow
def test_losses_inside_the_forward_pass_of_a_wrapper(tmp_path):
    wraps = ({}, {"find_unused_parameters": True}, {"static_graph": True})
    options = ({"loss": "uw"}, {"gradient": "cagrad", "loss": "uw"})
    cases = [(chosen, wrap, is_direct) for chosen in options for wrap in wraps for is_direct in (False, True)]
    first, second = run_on_ranks(losses_inside_forward, 2, tmp_path, 2, cases)
    for case, mine, theirs, whole in zip(cases, first, second, losses_inside_forward(0, 1, cases), strict=True):
        for a, b, c in zip(mine, theirs, whole, strict=True):
            assert torch.equal(a, b), case
            torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-13)


def test_a_wrapper_that_is_not_supported_is_refused(monkeypatch):
    class DeepSpeedEngine:
        pass

    module = types.ModuleType("deepspeed")
    module.DeepSpeedEngine = DeepSpeedEngine
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    _engine = DeepSpeedEngine()
    with pytest.raises(RuntimeError, match="does not support DeepSpeed"):
        read_model([nn.Parameter(torch.zeros(1))])


def test_a_copy_of_the_ranks_uses_all_processes(one_process):
    ranks = Ranks()
    assert ranks.size == 1
    for twin in (copy.deepcopy(ranks), pickle.loads(pickle.dumps(ranks))):
        assert twin.size == 1
    numbers = torch.ones(2)
    assert ranks.sum(numbers) is numbers


def step_in_a_group(rank):
    """Ranks 0 and 1 train together; rank 2 trains another model."""
    members = [0, 1] if rank < 2 else [2]
    group = distributed.new_group(members, use_local_synchronization=True)
    torch.manual_seed(0)
    trunk, heads = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    model = DistributedDataParallel(nn.Sequential(trunk, nn.Tanh(), heads), process_group=group)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    balancer = Balancer(2, gradient="nashmtl", process_group=group)
    balancer.backward(model(x[3 * rank : 3 * rank + 3] if rank < 2 else x).square().mean(0), shared=trunk.parameters())
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_a_process_group_of_some_ranks(tmp_path):
    first, second, alone = run_on_ranks(step_in_a_group, 3, tmp_path)
    for mine, theirs, whole in zip(first, second, alone, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, whole, rtol=1e-11, atol=1e-13)
