"""Small trainings with a Hugging Face Trainer, and the same trainings in a loop by hand."""

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from balance import Balancer, extra_forward
from balance.integrations.transformers import BalancedTrainer

TASKS = ("a", "b")
BY_NAME = {
    "uw+cagrad": {"loss": "uw", "gradient": "cagrad"},
    "famo": {"loss": "famo"},
    "dwa": {"loss": "dwa"},
    "nashmtl": {"gradient": "nashmtl"},
    "go4align+pcgrad": {"loss": "go4align", "gradient": "pcgrad"},
}


class Net(nn.Module):
    """Two heads on a trunk with dropout. As in the language models of transformers, any keyword is accepted."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout))
        self.a, self.b = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x, labels=None, **_):
        z = self.trunk(x)
        return {"a": self.a(z), "b": self.b(z)}


def task_losses(outputs, labels):
    return {task: (1 + 2 * k) * (outputs[task][:, 0] - labels[:, k]).square().mean() for k, task in enumerate(TASKS)}


class Trainer(BalancedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert num_items_in_batch is None
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = task_losses(outputs, labels)
        return (losses, outputs) if return_outputs else losses


class StopError(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, *_, **__):
        if state.global_step == self.step:
            raise StopError

    on_step_begin = on_substep_end


def rows(count=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)
    labels = x @ torch.randn(4, 2, generator=generator) + 0.3 * noise
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def arguments(folder, **keywords):
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(defaults | keywords))


def make(folder, name="uw+cagrad", kind=Trainer, *, is_inside=False, shared=None, trainer_options=(), **keywords):
    """A trainer whose network is equal in every call."""
    torch.manual_seed(0)
    net, balancer = Net(), Balancer(TASKS, **BY_NAME.get(name, {"loss": name}))
    if is_inside:
        net.balancer = balancer
    data = {"train_dataset": rows(), "eval_dataset": rows(7, seed=2)}
    options = {"balancer": balancer, "shared": shared or net.trunk.parameters(), **dict(trainer_options)}
    return kind(net, arguments(folder, **keywords), **data, **options)


def optimizer_by_hand(trainer):
    """AdamW with weight decay of the model's matrices only."""
    decayed = [p for name, p in trainer.model.named_parameters() if name.endswith("weight") and "balancer" not in name]
    ids = {id(p) for p in decayed}
    free = [p for p in trainer.model.parameters() if id(p) not in ids]
    free += [p for p in trainer.balancer.parameters() if id(p) not in {id(q) for q in free}]
    groups = [{"params": decayed, "weight_decay": trainer.args.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=trainer.args.learning_rate)


def train_by_hand(trainer, *, collect=False):
    """Train as the trainer does, in a loop that uses only its data loaders."""
    args, model, balancer, optimizer = trainer.args, trainer.model, trainer.balancer, optimizer_by_hand(trainer)
    loader, n = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
    total = int(args.num_train_epochs) * -(-len(loader) // n)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    shared, number = list(model.trunk.parameters()), 0

    def losses(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            outputs = model(batch["x"])
        return task_losses({task: output.float() for task, output in outputs.items()}, batch["labels"])

    def balance(window):
        if not collect:
            for batch in window:
                balancer.backward(losses(batch), shared=shared, factor=1 / len(window))
            return
        with balancer.collect():
            for batch in window:
                balancer.backward(losses(batch), shared=shared)

    def observe(window):
        with extra_forward(model), torch.no_grad():
            by_batch = [losses(batch) for batch in (window if collect else window[-1:])]
        balancer.observe({task: sum(each[task].double() for each in by_batch) / len(by_batch) for task in TASKS})

    for epoch in range(int(args.num_train_epochs)):
        loader.set_epoch(epoch)
        batches = iter(loader)
        while window := [batch for _, batch in zip(range(n), batches, strict=False)]:
            model.train()
            balance(window)
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if balancer.needs_observation:
                observe(window)
            scheduler.step()
            optimizer.zero_grad()
            number += 1
            if args.eval_strategy == "steps" and number % args.eval_steps == 0:
                list(trainer.get_eval_dataloader())  # it draws a random number
        balancer.end_epoch()
    return trainer


def difference(one, other):
    """The largest difference of any parameter or state of the rules."""
    pairs = [(one.model.state_dict(), other.model.state_dict()), (one.balancer.state_dict(), other.balancer.state_dict())]
    values = [(left[name].double() - right[name].double()).nan_to_num().abs().max() for left, right in pairs for name in left]
    return max(values).item()
