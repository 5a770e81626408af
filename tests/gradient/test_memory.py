"""The buffer of gradients, and the rules that keep one, in a stage."""

import copy
import io

import pytest
import torch
from torch import nn

from balance import Balancer, Splitter
from balance.gradient._memory import GradientMemory, inner_products
from balance.rules.snapshot import Snapshot, restored_on_error
from balance.testing import make_jacobian
from tests.gradient.directions import build
from tests.stage.three_tasks import TASKS, Network, assert_same, assert_same_state

NAMES = ["moco", "db_mtl", "config_momentum", "excess_mtl"]


def train(network, balancer, optimizer, steps, present=lambda step: TASKS):
    for step in steps:
        optimizer.zero_grad()
        losses = {task: loss for task, loss in network.losses().items() if task in present(step)}
        balancer.backward(losses, shared=network.shared())
        optimizer.step()


def training(name, seed=0):
    network = Network(seed)
    return network, Balancer(TASKS, gradient=name), torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("present", [lambda step: TASKS, lambda step: TASKS[step % 3 :]], ids=["all", "absent"])
@pytest.mark.parametrize("name", NAMES)
def test_resuming_from_disk_equals_not_stopping_bit_for_bit(name, present):
    straight = training(name)
    train(*straight, range(9), present)
    first = training(name)
    train(*first, range(4), present)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    resumed = training(name)
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(4, 9), present)
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(resumed[1].state_dict(), straight[1].state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_every_loss(name):
    network, balancer, _ = training(name)
    before = {task: loss.item() for task, loss in network.losses().items()}
    train(network, balancer, torch.optim.SGD(network.parameters(), lr=2e-3), range(60))
    assert all(loss.item() < before[task] for task, loss in network.losses().items())


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_same_names_before_the_first_step(name):
    network, balancer, optimizer = training(name)
    fresh = copy.deepcopy(balancer.state_dict())
    train(network, balancer, optimizer, range(2))
    used = balancer.state_dict()
    assert fresh.keys() == used.keys()
    assert all(isinstance(value, torch.Tensor) for value in used.values())
    balancer.load_state_dict(fresh)  # back to the beginning
    assert_same_state(balancer.state_dict(), fresh)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_failed_step_leaves_no_trace(name, steps):
    network, balancer, optimizer = training(name)
    train(network, balancer, optimizer, range(steps))
    before, gradients = copy.deepcopy(balancer.state_dict()), network.grads()
    forward = balancer.gradient_balancer.rule.forward

    def failing(*args, **keywords):
        forward(*args, **keywords)
        raise RuntimeError("after the state has changed")

    balancer.gradient_balancer.rule.forward = failing
    with pytest.raises(RuntimeError, match="after the state"):
        balancer.backward(network.losses(), shared=network.shared())
    del balancer.gradient_balancer.rule.forward
    assert_same_state(balancer.state_dict(), before)
    assert_same(network.grads(), gradients)
    train(network, balancer, optimizer, range(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_task_that_is_never_present_is_the_smaller_problem(name):
    larger, smaller = build(name, 3), build(name, 2)
    for step in range(3):
        J = make_jacobian(2, "generic", step)
        torch.testing.assert_close(larger(J, present=torch.tensor([0, 2])), smaller(J))


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_task_keeps_its_state(name):
    rule = build(name, 3)
    rule(make_jacobian(3, "generic", 0))
    before = copy.deepcopy(rule.state_dict())
    rule(make_jacobian(3, "generic", 1)[:2], present=torch.tensor([0, 1]))
    for key, value in rule.state_dict().items():
        if len(value) == 3:
            assert torch.equal(value[2], before[key][2]), key
            assert not torch.equal(value[:2], before[key][:2]) or key in ("weights", "first_excess")


@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_alone(name):
    rule = build(name, 2)
    J = make_jacobian(2, "generic", 0)
    rule(J)
    twin = copy.deepcopy(rule)
    assert torch.equal(rule(2 * J), twin(2 * J))
    rule(J)
    assert not torch.equal(rule(J), twin(J)) or name == "config_momentum"


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_parameters_is_an_error(name):
    rule = build(name, 2)
    rule(torch.ones(2, 3))
    with pytest.raises(ValueError, match=f"'{name}' remembers gradients of 3 shared parameters, but got 4"):
        rule(torch.ones(2, 4))
    with pytest.raises(ValueError, match="shape"):
        rule(torch.ones(3))


@pytest.mark.parametrize("name", NAMES)
def test_features_and_splitters_are_refused(name):
    with pytest.raises(ValueError, match="features differ from step to step"):
        Balancer(TASKS, gradient=name, source="features")
    with pytest.raises(ValueError, match="features differ from step to step"):
        Splitter(TASKS, name)


@pytest.mark.parametrize("name", ["gradnorm", "ntk", "epo", "pmgda"])
def test_splitters_have_no_losses(name):
    with pytest.raises(ValueError, match="A Splitter sees no losses"):
        Splitter(TASKS, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_memory_is_at_least_float32_and_the_direction_has_the_dtype_of_the_gradients(name, dtype):
    rule = build(name, 2)
    J = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=dtype)
    for _ in range(2):
        assert rule(J).dtype == dtype
    rows = [buffer for key, buffer in rule.named_buffers() if key.endswith("rows")]
    assert all(buffer.dtype == torch.promote_types(dtype, torch.float32) for buffer in rows)


def test_memory_of_a_module_that_is_moved_and_cast():
    memory = GradientMemory(2, "x").double()
    assert memory.like(torch.ones(2, 5)).dtype == torch.float64
    half = GradientMemory(2, "x").half()
    assert half.like(torch.ones(2, 5, dtype=torch.float16)).dtype == torch.float32
    with torch.device("meta"):
        empty = GradientMemory(2, "x")
    empty.load_state_dict(memory.state_dict(), assign=True)
    assert torch.equal(empty.rows, memory.rows)


def test_a_checkpoint_of_other_tasks_is_refused():
    memory = GradientMemory(2, "x")
    memory.like(torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="size mismatch"):
        GradientMemory(3, "x").load_state_dict(memory.state_dict())


def test_snapshot_restores_the_buffer_that_was_there():
    module = nn.Sequential(GradientMemory(2, "x"))
    snapshot = Snapshot(module)
    module[0].like(torch.ones(2, 5)).fill_(3)
    with pytest.raises(ZeroDivisionError), restored_on_error(module):
        module[0].like(torch.ones(2, 5)).fill_(4)
        raise ZeroDivisionError
    assert (module[0].rows == 3).all()
    snapshot.restore()
    assert module[0].rows.shape == (2, 0)


def test_inner_products_of_many_columns():
    rows = torch.randn(3, 2**20 + 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inner_products(rows), rows.double() @ rows.double().T)
