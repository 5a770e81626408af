"""A small network that Lightning trains, and the same training written by hand."""

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from balance import Balancer, extra_forward
from balance.integrations.lightning import BalanceCallback

TASKS = ("a", "b", "c")
PAIRS = {
    "uw+cagrad": {"loss": "uw", "gradient": "cagrad"},
    "famo": {"loss": "famo"},
    "go4align+pcgrad": {"loss": "go4align", "gradient": "pcgrad"},
    "nashmtl": {"gradient": "nashmtl"},
    "dwa": {"loss": "dwa"},
}
KINDS = {
    "plain": {},
    "accumulation and clipping": {"accumulate": 2, "clip": 0.5},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"precision": "16-mixed"},
    "fp16, accumulation and clipping": {"precision": "16-mixed", "accumulate": 2, "clip": 0.5},
}
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Batches:
    """Batches in memory; an iterator that begins where a checkpoint has left it."""

    def __init__(self, count=5, size=12, dtype=torch.float32, seed=0, part=slice(None)):
        generator = torch.Generator().manual_seed(seed)
        self.batches = [torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)[part] for _ in range(count)]
        self.place, self.is_resumed = 0, False

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.place, self.is_resumed = self.place if self.is_resumed else 0, False
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place, self.is_resumed = state["place"] % len(self), True


class Module(LightningModule):
    """A network with three tasks.

    Args:
        options: Options of the balancer.
        plain: Neither batch normalisation nor dropout, and float64.
        lr: Learning rate.
    """

    def __init__(self, options, *, plain=False, lr=0.05):
        super().__init__()
        torch.manual_seed(1)
        self.lr = lr
        between = [nn.Tanh()] if plain else [nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2)]
        self.trunk = nn.Sequential(nn.Linear(6, 8), *between)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})
        self.balancer = Balancer(TASKS, **options)
        if plain:
            self.double()

    def task_losses(self, x):
        z = self.trunk(x)
        return {task: (head(z) - k).square().mean() * 10**k for k, (task, head) in enumerate(self.heads.items())}

    def training_step(self, batch, batch_idx):
        return self.balancer.loss(self.task_losses(batch), shared=self.trunk.parameters())

    def validation_step(self, batch, batch_idx):
        self.log("val", sum(self.task_losses(batch).values()), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def module_with(options, *, plain=False, **methods):
    """A module with some methods changed."""
    return type("Changed", (Module,), methods)(options, plain=plain)


def saving(folder, **options):
    """A callback that saves all checkpoints, the last one as last.ckpt."""
    return ModelCheckpoint(folder, **({"save_top_k": -1, "save_last": True} | options))


def trainer(folder, *callbacks, precision=None, accumulate=1, clip=None, scale=2.0**10, **options):
    """A trainer that writes nothing but checkpoints."""
    plugins = []
    if precision is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if precision == "16-mixed" else None
        plugins = [MixedPrecision(precision, "cpu", scaler)]
    given = {"max_epochs": 2, "logger": False, "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(
        **(given | quiet | options),
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        plugins=plugins,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )


def fit(folder, options, *callbacks, batches=None, module=None, validation=None, ckpt_path=None, **chosen):
    """Train with Lightning, by default with a `BalanceCallback`; the module."""
    module = Module(options) if module is None else module
    training = trainer(folder, *(callbacks or [BalanceCallback()]), **chosen)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        ignore_warnings_of_lightning()
        training.fit(module, batches or Batches(), validation, ckpt_path=ckpt_path)
    return module


def ignore_warnings_of_lightning():
    for message in (
        ".*does not have many workers",
        ".*number of training batches .* is smaller than the logging interval",
        ".*isinstance.treespec, LeafSpec.*",
        ".*You defined a `validation_step` but have no `val_dataloader`",
        ".*callbacks used to create the checkpoint need to be provided",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit_by_hand(options, *, precision=None, accumulate=1, clip=None, scale=2.0**10, epochs=2, batches=None, module=None):
    """Train as `fit` does, with a loop that is written here."""
    model, batches = Module(options) if module is None else module, batches or Batches()
    balancer, optimizer = model.balancer, model.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=precision == "16-mixed")
    autocast = {"device_type": "cpu", "dtype": DTYPES.get(precision), "enabled": precision is not None, "cache_enabled": False}
    torch.manual_seed(2)
    model.train()
    for _ in range(epochs):
        for number, batch in enumerate(batches, 1):
            if number % accumulate == 1 % accumulate:
                optimizer.zero_grad()
            with torch.autocast(**autocast):
                losses = model.task_losses(batch)
            balancer.backward(losses, shared=model.trunk.parameters(), factor=1 / accumulate, scaler=scaler)
            if number % accumulate and number < len(batches):
                continue
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if balancer.needs_observation and scaler.get_scale() >= scale:
                with extra_forward(model), torch.no_grad(), torch.autocast(**autocast):
                    losses = model.task_losses(batch)
                balancer.observe(losses)
        balancer.end_epoch()
    return model


def largest_difference(first, second):
    """Largest difference of any entry of two states; both must have the same entries."""
    first, second = first.state_dict(), second.state_dict()
    assert list(first) == list(second)
    differences = [0.0]
    for name, value in first.items():
        assert value.shape == second[name].shape, name
        if value.numel():
            both_nan = value.isnan() & second[name].isnan()
            differences.append(torch.where(both_nan, 0.0, (value.double() - second[name].double()).abs()).max().item())
    return max(differences)
