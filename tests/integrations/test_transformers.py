import gc

import pytest
import torch
from torch import nn
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback

import balance
from balance.integrations.transformers import BalancedTrainer, BalancedTrainerMixin, TaskLosses
from tests.integrations.trainers import (
    BY_NAME,
    TASKS,
    Net,
    StopAt,
    StopError,
    Trainer,
    arguments,
    difference,
    make,
    rows,
    task_losses,
    train_by_hand,
)

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Each training collects garbage, which takes longer than the training if it visits all modules of transformers."""
    gc.freeze()
    yield
    gc.unfreeze()


class Gradients(TrainerCallback):
    """Gradients of the model at each optimizer step, before clipping where there is none."""

    def __init__(self):
        self.by_step = []

    def on_pre_optimizer_step(self, *_, model, **__):
        self.by_step.append([p.grad.clone() for p in model.parameters()])


def assert_equal_by_hand(tmp_path, name, *, collect=False, **keywords):
    keywords |= {"trainer_options": {"collect": collect}, **EVALUATED}
    trainer = make(tmp_path, name, **keywords)
    trainer.train()
    assert difference(trainer, make(tmp_path, name, **keywords)) > 0.1
    assert difference(trainer, train_by_hand(make(tmp_path, name, **keywords), collect=collect)) == 0


@pytest.mark.parametrize(
    ("name", "n", "bf16", "collect", "is_inside"),
    [
        ("uw+cagrad", 2, False, False, False),
        ("famo", 2, True, False, True),
        ("famo", 2, False, True, False),
    ],
)
def test_training_is_that_of_a_loop_by_hand(tmp_path, name, n, bf16, collect, is_inside):
    assert_equal_by_hand(tmp_path, name, collect=collect, gradient_accumulation_steps=n, bf16=bf16, is_inside=is_inside)


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("collect", [False, True], ids=["separate", "collect"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_training_is_that_of_a_loop_by_hand(tmp_path, name, n, bf16, collect, is_inside):
    assert_equal_by_hand(tmp_path, name, collect=collect, gradient_accumulation_steps=n, bf16=bf16, is_inside=is_inside)


def assert_resumes(tmp_path, name, stop, *, save_steps=2, **keywords):
    keywords |= EVALUATED
    undisturbed = make(tmp_path / "undisturbed", name, **keywords)
    undisturbed.train()
    keywords |= {"save_strategy": "steps", "save_steps": save_steps}
    interrupted = make(tmp_path, name, **keywords)
    interrupted.add_callback(StopAt(stop))
    with pytest.raises(StopError):
        interrupted.train()
    resumed = make(tmp_path, name, **keywords)
    resumed.train(resume_from_checkpoint=True)
    assert difference(resumed, undisturbed) == 0


@pytest.mark.parametrize(("name", "stop", "save_steps"), [("famo", 5, 2), ("dwa", 4, 3)], ids=["mid-epoch", "end of epoch"])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, name, stop, save_steps):
    """Epochs have 3 optimizer steps: the state of dwa is that after the end of the epoch, although the Trainer saves before."""
    assert_resumes(tmp_path, name, stop, save_steps=save_steps, gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("stop", [4, 5, 8])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_resumed_training_is_the_undisturbed_one(tmp_path, name, n, stop, is_inside):
    assert_resumes(tmp_path, name, stop, gradient_accumulation_steps=n, is_inside=is_inside)


def tokens_by_task(outputs, labels, mask):
    """Mean losses over the tokens that a mask selects, and their numbers."""
    counts = {task: mask[:, k].sum() for k, task in enumerate(TASKS)}
    errors = torch.cat([outputs[task] for task in TASKS], 1) - labels
    return {t: (errors[:, k].square() * mask[:, k]).sum() / counts[t] for k, t in enumerate(TASKS)}, counts


class TokenTrainer(BalancedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is None
        labels, mask = inputs.pop("labels"), inputs.pop("mask")
        losses, counts = tokens_by_task(model(**inputs), labels, mask)
        return TaskLosses(losses, counts=counts)


@pytest.mark.parametrize("collect", [False, True])
def test_token_means_under_accumulation(tmp_path, collect):
    """`.grad` is the mean of the directions, or exactly the direction of the means over all tokens of the optimizer step.

    The network accepts any keyword, for which the Trainer would leave out the division by the number of micro-batches.
    """
    data, gradients = rows(8), Gradients()
    for i, row in enumerate(data):
        row["mask"] = torch.tensor([float(i != 1), float(i % 4 == 0 or i > 4)])  # unequal numbers of both tasks
    trainer = make(
        tmp_path,
        "ls",
        TokenTrainer,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        trainer_options={"collect": collect, "callbacks": [gradients]},
    )
    trainer.train_dataset = data
    trainer.model.trunk[2].p = 0.0
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    net = Net(dropout=0)
    net.load_state_dict(start)
    parts = [range(8)] if collect else [range(4), range(4, 8)]
    for part in parts:
        x, labels, mask = (torch.stack([data[i][key] for i in part]) for key in ("x", "labels", "mask"))
        losses, _ = tokens_by_task(net(x), labels, mask)
        (sum(losses.values()) / len(parts)).backward()
    torch.testing.assert_close(gradients.by_step[0], [p.grad for p in net.parameters()])


class SometimesAbsent(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if len(outputs["a"]) < 4:
            del losses["b"]
        return (losses, outputs) if return_outputs else losses


def test_evaluation_reports_the_sum_and_each_task(tmp_path):
    trainer = make(tmp_path, kind=SometimesAbsent)
    metrics = trainer.evaluate()
    data = rows(7, seed=2)
    sizes, by_task, total = (4, 3), {"a": 0.0, "b": 0.0}, 0.0
    for begin, size in zip((0, 4), sizes, strict=True):
        x, labels = (torch.stack([row[key] for row in data[begin : begin + size]]) for key in ("x", "labels"))
        losses = task_losses(trainer.model.eval()(x), labels)
        by_task["a"] += losses["a"].item() * size / 7
        by_task["b"] += losses["b"].item() * (size == 4)
        total += (losses["a"] + (losses["b"] if size == 4 else 0)).item() * size / 7
    assert metrics["eval_loss"] == pytest.approx(total)
    assert {task: metrics[f"eval_loss_{task}"] for task in TASKS} == pytest.approx(by_task)
    assert trainer.predict(rows(5)).metrics.keys() >= {"test_loss", "test_loss_a", "test_loss_b"}


@pytest.mark.parametrize("by_name", [False, True], ids=["one data set", "two data sets"])
def test_coba_observes_each_evaluation_of_the_training(tmp_path, by_name):
    trainer = make(tmp_path, "coba", eval_strategy="steps", eval_steps=5, num_train_epochs=2)
    if by_name:
        trainer.eval_dataset = {"first": rows(4, seed=2), "second": rows(4, seed=3)}
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    rule = trainer.balancer.loss_balancer.state_dict()
    assert [value.item() for name, value in rule.items() if name.endswith("observations")] == [1]  # after the first


def test_logs_contain_the_record_of_the_step(tmp_path):
    trainer = make(tmp_path, num_train_epochs=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    assert all(entry.keys() >= trainer.balancer.report.as_metrics().keys() for entry in logged)
    assert logged[-1]["weight/a"] > 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
def test_the_optimizer_trains_the_balancer_without_weight_decay(tmp_path, optim, is_inside):
    trainer = make(tmp_path, optim=optim, is_inside=is_inside)
    groups = trainer.create_optimizer().param_groups
    own = {id(p) for p in trainer.balancer.parameters()}
    found = [group["weight_decay"] for group in groups for p in group["params"] if id(p) in own]
    assert found == [0.0] * len(own)
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))


def test_learning_rate_of_the_balancer(tmp_path):
    trainer = make(tmp_path, trainer_options={"balancer_lr": 0.5})
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.05, 0.05, 0.5]


def test_the_best_model_comes_with_its_balancer(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "num_train_epochs": 1, **EVALUATED}
    trainer = make(tmp_path, **options)  # here the validation loss grows
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = torch.load(tmp_path / "checkpoint-2" / "balancer.pt")
    torch.testing.assert_close(trainer.balancer.state_dict(), best, rtol=0, atol=0)


def test_a_new_model_gets_a_new_balancer(tmp_path):
    def fresh(trial=None):
        torch.manual_seed(0)
        return Net()

    trained = []
    balancer = balance.Balancer(TASKS, loss="famo")
    plain = make(tmp_path, max_steps=2)
    trainer = Trainer(
        None, plain.args, train_dataset=rows(), model_init=fresh, balancer=balancer, shared=lambda net: net.trunk.parameters()
    )
    for _ in range(2):
        trainer.train()
        trained.append({name: value.clone() for name, value in balancer.state_dict().items()})
    torch.testing.assert_close(*trained, rtol=0, atol=0, equal_nan=True)


class WithLosses(Net):
    def forward(self, x, labels=None, **keywords):
        assert "num_items_in_batch" not in keywords
        outputs = super().forward(x)
        return {"loss": task_losses(outputs, labels), "a": outputs["a"], "b": outputs["b"]}


class TheirTrainer(PlainTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return (task_losses(outputs, labels), outputs) if return_outputs else task_losses(outputs, labels)


class Mixed(BalancedTrainerMixin, TheirTrainer):
    pass


def test_losses_of_the_model_of_a_function_and_of_another_trainer(tmp_path):
    def losses_of(outputs, labels, num_items_in_batch=None):
        return task_losses(outputs, labels)

    keywords = {"gradient_accumulation_steps": 2, "max_steps": 1}
    expected = make(tmp_path, **keywords)
    expected.train()
    for kind, options in ((BalancedTrainer, {"compute_loss_func": losses_of}), (Mixed, {}), (BalancedTrainer, {})):
        trainer = make(tmp_path, kind=kind, trainer_options=options, **keywords)
        if kind is BalancedTrainer and not options:
            trainer.model.__class__ = WithLosses
        trainer.train()
        trainer.evaluate()
        assert difference(trainer, expected) == 0


# Half precision, checkpointing of activations, language models


def with_scaler(trainer, monkeypatch):
    """Let a trainer use float16 on the CPU, for which Accelerate itself has no scaler."""
    accelerator = trainer.accelerator
    monkeypatch.setitem(accelerator.state.__dict__, "_mixed_precision", "fp16")
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**12), True
    return trainer


class Skipped(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.skipped, self.states = trainer, [], []

    def on_step_end(self, *_, **__):
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)
        self.states.append(self.trainer.balancer.loss_balancer.state_dict()["rule.logits"].clone())


class Overflowing(Trainer):
    """The first micro-batch overflows, the second one, of the same optimizer step, does not."""

    calls = 0

    def compute_loss(self, *args, **keywords):
        self.calls += 1
        losses = super().compute_loss(*args, **keywords)
        return {task: loss * torch.inf for task, loss in losses.items()} if self.calls == 1 else losses


@pytest.mark.parametrize("collect", [False, True])
def test_rules_learn_nothing_from_steps_that_overflow(tmp_path, monkeypatch, collect):
    balancer = balance.Balancer(TASKS, loss="famo", gradient="cagrad")
    keywords = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    options = {"collect": collect, "balancer": balancer}
    trainer = with_scaler(make(tmp_path, kind=Overflowing, trainer_options=options, **keywords), monkeypatch)
    events = Skipped(trainer)
    trainer.add_callback(events)
    trainer.train()
    assert events.skipped[0]
    assert sum(events.skipped) < len(events.skipped) - 2
    before = torch.zeros_like(events.states[0])
    for is_skipped, state in zip(events.skipped, events.states, strict=True):
        assert torch.equal(state, before) == is_skipped
        before = state
    assert 0.01 < trainer.balancer.report.losses.max() < 100  # without the scale


class LanguageTrainer(BalancedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        losses = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = nn.functional.cross_entropy(losses, inputs["input_ids"][:, 1:], reduction="none").mean(1)
        by_task = {task: losses[inputs["source"] == k].mean() for k, task in enumerate(TASKS)}
        return (by_task, outputs) if return_outputs else by_task


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [False, True], ids=["outside", "inside"])
def test_language_models_with_checkpointing_of_activations(tmp_path, is_inside):
    """The state of a balancer inside of a PreTrainedModel survives ``save_pretrained``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = [{"input_ids": torch.arange(6) * (1 + i % 3) % 16, "source": i % 2} for i in range(16)]

    def build(name, **keywords):
        torch.manual_seed(0)
        net, balancer = LlamaForCausalLM(LlamaConfig(**sizes)), balance.Balancer(TASKS, loss="uw", gradient="cagrad")
        if is_inside:
            net.balancer = balancer
        common = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
        args = arguments(tmp_path / name, **common, **keywords)
        return LanguageTrainer(net, args, train_dataset=data, balancer=balancer, shared=net.model.parameters())

    plain, recomputed = build("plain"), build("recomputed", activation_checkpointing=True)
    plain.train()
    recomputed.train()
    assert difference(plain, recomputed) < 1e-4
    interrupted = build("resumed", save_strategy="steps", save_steps=3)
    interrupted.add_callback(StopAt(4))
    with pytest.raises(StopError):
        interrupted.train()
    if is_inside:
        (tmp_path / "resumed" / "checkpoint-3" / "balancer.pt").unlink()
    resumed = build("resumed", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert difference(plain, resumed) == 0
