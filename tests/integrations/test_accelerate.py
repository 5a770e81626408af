import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import DataLoader, TensorDataset

import balance
from balance.integrations import accelerate as integration

TASKS = ("a", "b")
BY_NAME = {
    "uw+cagrad": {"loss": "uw", "gradient": "cagrad"},
    "famo": {"loss": "famo"},
    "go4align+pcgrad": {"loss": "go4align", "gradient": "pcgrad"},
    "nashmtl": {"gradient": "nashmtl"},
    "dwa": {"loss": "dwa"},
}
EPOCHS, BATCHES = 2, 6


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x):
        z = self.trunk(x)
        return {task: head(z) for task, head in self.heads.items()}


def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def task_losses(outputs, y):
    return {task: (1 + 2 * k) * (outputs[task][:, 0] - y[:, k]).square().mean() for k, task in enumerate(TASKS)}


class Training:
    """A network, a balancer and an optimizer, equal in every instance."""

    def __init__(self, name, *, is_inside=False):
        torch.manual_seed(0)
        self.net, self.balancer = Net(), balance.Balancer(TASKS, **BY_NAME[name])
        if is_inside:
            self.net.balancer = self.balancer
        parameters = {id(p): p for p in (*self.net.parameters(), *self.balancer.parameters())}
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
        torch.manual_seed(5)

    def state(self):
        return self.net.state_dict() | {f"balancer.{name}": value for name, value in self.balancer.state_dict().items()}


def difference(one, other):
    pairs = zip(one.state().values(), other.state().values(), strict=True)
    return max((left.double() - right.double()).nan_to_num().abs().max().item() for left, right in pairs)


def train_by_hand(training, n, dtype=None, scaler=None):
    net, balancer, optimizer = training.net, training.balancer, training.optimizer

    def losses(batch):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            outputs = net(batch[0])
        return task_losses({task: output.float() for task, output in outputs.items()}, batch[1])

    for _ in range(EPOCHS):
        for number, batch in enumerate(data(), 1):
            balancer.backward(losses(batch), shared=net.trunk.parameters(), factor=1 / n, scaler=scaler)
            if number % n:
                continue
            is_skipped = step_by_hand(net, optimizer, scaler)
            if balancer.needs_observation and not is_skipped:
                with balance.extra_forward(net), torch.no_grad():
                    observed = losses(batch)
                balancer.observe(observed)
            optimizer.zero_grad()
        balancer.end_epoch()
    return training


def step_by_hand(net, optimizer, scaler):
    """Clip and step; return whether the scaler has skipped the step."""
    if scaler is None:
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        return False
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < scale


def accelerator_of(n, precision, scaler=None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n, mixed_precision=precision)
    if scaler is not None:  # Accelerate itself makes none on a CPU
        accelerator.scaler, accelerator.native_amp = scaler, True
    return accelerator


class Accelerated:
    """The training in Accelerate's loop."""

    def __init__(self, name, n, precision="no", scaler=None, *, is_inside=False):
        self.training = Training(name, is_inside=is_inside)
        self.accelerator = accelerator_of(n, precision, scaler)
        self.net, self.optimizer, self.loader = self.accelerator.prepare(self.training.net, self.training.optimizer, data())
        self.balancer = integration.prepare(self.accelerator, self.training.balancer)

    def epoch(self, loader, stop=None):
        accelerator, balancer, net, optimizer = self.accelerator, self.balancer, self.net, self.optimizer
        shared = list(self.training.net.trunk.parameters())
        for number, (x, y) in enumerate(loader):
            if number == stop:
                return
            with accelerator.accumulate(net):
                accelerator.backward(balancer.loss(task_losses(net(x), y), shared=shared))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                integration.observe(accelerator, balancer, net, lambda x=x, y=y: task_losses(net(x), y))
                optimizer.zero_grad()
        balancer.end_epoch()

    def train(self):
        for _ in range(EPOCHS):
            self.epoch(self.loader)
        return self.training


def assert_equal_by_hand(name, n, precision, *, is_inside=False):
    scales = [torch.amp.GradScaler("cpu", init_scale=2.0**17) if precision == "fp16" else None for _ in range(2)]
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    expected = train_by_hand(Training(name, is_inside=is_inside), n, dtype, scales[0])
    found = Accelerated(name, n, precision, scales[1], is_inside=is_inside).train()
    moved = (expected.net.trunk[0].weight - Training(name).net.trunk[0].weight).abs().max()
    assert moved > 0.04
    assert difference(expected, found) == 0
    if precision == "fp16":
        assert scales[0].get_scale() == scales[1].get_scale() < 2.0**17  # some steps were skipped


@pytest.mark.parametrize(
    ("name", "n", "precision", "is_inside"),
    [
        ("uw+cagrad", 2, "no", False),
        ("famo", 2, "bf16", False),
        ("famo", 1, "no", True),
        ("uw+cagrad", 1, "fp16", False),
        ("dwa", 2, "no", False),
    ],
)
def test_training_is_that_of_a_loop_by_hand(name, n, precision, is_inside):
    assert_equal_by_hand(name, n, precision, is_inside=is_inside)


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_training_is_that_of_a_loop_by_hand(name, n, precision, is_inside):
    assert_equal_by_hand(name, n, precision, is_inside=is_inside)


@pytest.mark.parametrize("name", ["famo", "dwa"])
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
def test_a_training_resumes_in_the_middle_of_an_epoch(tmp_path, name, is_inside):
    expected = Accelerated(name, 2, is_inside=is_inside).train()
    interrupted = Accelerated(name, 2, is_inside=is_inside)
    interrupted.epoch(interrupted.loader, stop=4)
    interrupted.accelerator.save_state(str(tmp_path))
    del interrupted
    assert_resumes(expected, name, tmp_path, is_inside=is_inside)


def train_until_killed(_, name, folder):
    """Save a state, train one more step, and be killed."""
    torch.set_num_threads(1)
    training = Accelerated(name, 2)
    training.epoch(training.loader, stop=4)
    training.accelerator.save_state(folder)
    training.epoch(training.loader, stop=2)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["famo", "uw+cagrad"])
def test_a_killed_training_resumes(tmp_path, name):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(train_until_killed, args=(name, str(tmp_path)), nprocs=1)
    assert_resumes(Accelerated(name, 2).train(), name, tmp_path)


def assert_resumes(expected, name, tmp_path, *, is_inside=False):
    """Check that a new process that continues from the saved state, after four batches, ends like an undisturbed training."""
    resumed = Accelerated(name, 2, is_inside=is_inside)
    rest = resumed.accelerator.skip_first_batches(resumed.loader, 4)
    rest = Restored(rest, lambda: resumed.accelerator.load_state(str(tmp_path)))
    resumed.epoch(rest)
    resumed.epoch(resumed.loader)
    assert difference(expected, resumed.training) == 0


class Restored:
    """Batches after a call, so that the random numbers that the loader draws belong to the time before."""

    def __init__(self, loader, call):
        self.loader, self.call = loader, call

    def __iter__(self):
        batches = iter(self.loader)
        first = next(batches)
        self.call()
        yield first
        yield from batches


def test_collect_makes_one_step_of_all_micro_batches():
    accelerated = Accelerated("uw+cagrad", 1)
    expected = Training("uw+cagrad")
    batches = list(data())[:2]
    for training in (accelerated.training, expected):
        torch.manual_seed(5)
        with training.balancer.collect():
            for x, y in batches:
                training.balancer.backward(task_losses(training.net(x), y), shared=training.net.trunk.parameters())
        training.optimizer.step()
    assert difference(accelerated.training, expected) == 0


def test_a_skipped_step_is_not_observed():
    accelerated = Accelerated("famo", 1, "fp16", torch.amp.GradScaler("cpu", init_scale=2.0**100))
    accelerated.epoch(accelerated.loader, stop=1)
    assert accelerated.accelerator.optimizer_step_was_skipped
    assert torch.equal(accelerated.balancer.state_dict()["loss_balancer.rule.steps"], torch.zeros(2).double())


def test_a_second_preparation_registers_nothing_new():
    accelerated = Accelerated("uw+cagrad", 1)
    integration.prepare(accelerated.accelerator, accelerated.balancer)
    assert len(accelerated.accelerator._custom_objects) == 1


# Errors


def test_a_direct_backward_is_an_error():
    accelerated = Accelerated("dwa", 2)
    losses = task_losses(accelerated.net(torch.ones(2, 4)), torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"accelerator\.backward\(balancer\.loss\(losses"):
        accelerated.balancer.backward(losses, shared=accelerated.training.net.trunk.parameters())


def test_preparation_without_an_optimizer_is_an_error():
    with pytest.raises(ValueError, match=r"Call accelerator\.prepare"):
        integration.prepare(accelerator_of(1, "no"), balance.Balancer(TASKS, loss="uw"))


def test_an_optimizer_without_the_balancer_is_an_error():
    training, accelerator = Training("dwa"), accelerator_of(1, "no")
    accelerator.prepare(training.net, training.optimizer)
    with pytest.raises(ValueError, match="must train the parameters of the balancer"):
        integration.prepare(accelerator, balance.Balancer(TASKS, loss="uw"))


def test_swapped_arguments_are_an_error():
    accelerated = Accelerated("dwa", 1)
    with pytest.raises(TypeError, match=r"balancer must be a balance\.Balancer, but got Accelerator"):
        integration.prepare(accelerated.balancer, accelerated.accelerator)
