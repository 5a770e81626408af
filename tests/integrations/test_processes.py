"""Trainings of the integrations in processes that are killed, and in two processes at once."""

import os
import signal

import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback

from tests.distributed.processes import run_on_ranks
from tests.integrations.trainers import Net, make, rows

pytestmark = pytest.mark.slow


class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, *_, **__):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


KEYWORDS = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


def train_until_killed(_, folder, name):
    torch.set_num_threads(1)
    trainer = make(folder, name, save_strategy="steps", save_steps=2, **KEYWORDS)
    trainer.add_callback(KillAt())
    trainer.train()


def resume(folder, name):
    trainer = make(folder, name, save_strategy="steps", save_steps=2, **KEYWORDS)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def states(trainer):
    return {"net": trainer.model.state_dict(), "balancer": trainer.balancer.state_dict()}


@pytest.mark.parametrize("name", ["famo", "uw+cagrad", "dwa", "go4align+pcgrad"])
def test_a_killed_training_resumes_in_the_middle_of_an_epoch(tmp_path, name):
    undisturbed = make(tmp_path / "undisturbed", name, **KEYWORDS)
    undisturbed.train()
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(train_until_killed, args=(str(tmp_path), name), nprocs=1)
    assert (tmp_path / "checkpoint-4" / "balancer.pt").exists()
    torch.testing.assert_close(states(resume(tmp_path, name)), states(undisturbed), rtol=0, atol=0, equal_nan=True)


def options_of(n, collect):
    return {
        "gradient_accumulation_steps": n,
        "num_train_epochs": 2,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "trainer_options": {"collect": collect},
    }


def without_dropout(trainer):
    trainer.model.trunk[2].p = 0.0
    trainer.train_dataset, trainer.eval_dataset = rows(16), rows(8, seed=2)
    return trainer


def name_rank(rank):
    """Set the environment that torchrun sets."""
    number = str(rank)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def train_on_rank(rank, folder, name, n, collect):
    name_rank(rank)
    trainer = without_dropout(make(folder, name, per_device_train_batch_size=2, ddp_backend="gloo", **options_of(n, collect)))
    assert trainer.args.world_size == 2
    trainer.train()
    metrics = {key: value for key, value in trainer.evaluate().items() if "loss" in key}
    return states(trainer), metrics


@pytest.mark.parametrize(
    ("name", "n", "collect"),
    [("uw+cagrad", 1, False), ("uw+cagrad", 2, True), ("famo", 2, False), ("famo", 2, True), ("dwa", 2, False)],
)
def test_two_processes_train_as_one_with_their_batches(tmp_path, name, n, collect):
    alone = without_dropout(make(tmp_path, name, per_device_train_batch_size=4, **options_of(n, collect)))
    alone.train()
    metrics = {key: value for key, value in alone.evaluate().items() if "loss" in key}
    results = run_on_ranks(train_on_rank, 2, tmp_path, str(tmp_path), name, n, collect)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(results[0][0], states(alone), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert results[0][1] == pytest.approx(metrics, rel=1e-4) == results[1][1]


def inside_on_rank(rank, folder):
    name_rank(rank)
    try:
        make(folder, ddp_backend="gloo", is_inside=True)
    except ValueError as error:
        return str(error)


def test_a_balancer_inside_of_the_model_is_an_error_over_two_processes(tmp_path):
    assert all("several processes" in message for message in run_on_ranks(inside_on_rank, 2, tmp_path, str(tmp_path)))


def accelerated_on_rank(rank):
    from accelerate import Accelerator

    from balance import Balancer
    from balance.integrations.accelerate import observe, prepare
    from tests.integrations.trainers import TASKS, task_losses

    name_rank(rank)
    torch.manual_seed(0)
    accelerator, net = Accelerator(cpu=True, gradient_accumulation_steps=2), Net(dropout=0)
    balancer = Balancer(TASKS, loss="famo", gradient="cagrad")
    shared, optimizer = list(net.trunk.parameters()), torch.optim.SGD(net.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(net, optimizer, torch.utils.data.DataLoader(rows(16), batch_size=2))
    prepare(accelerator, balancer)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(balancer.loss(task_losses(model(batch["x"]), batch["labels"]), shared=shared))
            optimizer.step()
            observe(accelerator, balancer, model, lambda b=batch: task_losses(model(b["x"]), b["labels"]))
            optimizer.zero_grad()
    assert accelerator.num_processes == 2
    return {"net": net.state_dict(), "balancer": balancer.state_dict()}


def test_two_processes_of_accelerate_train_as_one_with_their_batches(tmp_path):
    from balance import Balancer, extra_forward
    from tests.integrations.trainers import TASKS, task_losses

    torch.manual_seed(0)
    net, balancer = Net(dropout=0), Balancer(TASKS, loss="famo", gradient="cagrad")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for number, batch in enumerate(torch.utils.data.DataLoader(rows(16), batch_size=4), 1):
        losses = task_losses(net(batch["x"]), batch["labels"])
        balancer.backward(losses, shared=net.trunk.parameters(), factor=1 / 2)
        if number % 2 == 0:
            optimizer.step()
            with extra_forward(net), torch.no_grad():
                balancer.observe(task_losses(net(batch["x"]), batch["labels"]))
            optimizer.zero_grad()
    results = run_on_ranks(accelerated_on_rank, 2, tmp_path)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    expected = {"net": net.state_dict(), "balancer": balancer.state_dict()}
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
