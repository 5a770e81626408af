"""Lightning's training loop, next to loops that are written by hand. Lightning is imported by the first test that runs."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from balance import Balancer

ROOT = Path(__file__).parents[2]
FAST = [("plain", "uw+cagrad"), ("plain", "dwa"), ("fp16, accumulation and clipping", "famo")]
KINDS = ("plain", "accumulation and clipping", "bf16", "fp16", "fp16, accumulation and clipping")
PAIRS = ("uw+cagrad", "famo", "go4align+pcgrad", "nashmtl", "dwa")


@pytest.fixture
def runs():
    """The module that imports Lightning."""
    pytest.importorskip("lightning")
    from tests.integrations import lightning_runs

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return lightning_runs


def cases(kinds, pairs):
    for kind in kinds:
        for pair in pairs:
            yield pytest.param(kind, pair, id=f"{kind}-{pair}", marks=[] if (kind, pair) in FAST else [pytest.mark.slow])


def fast_for(*pairs):
    return [pytest.param(pair, marks=[] if pair in pairs else [pytest.mark.slow]) for pair in PAIRS]


@pytest.mark.parametrize(("kind", "pair"), list(cases(KINDS, PAIRS)))
def test_lightning_trains_as_a_loop_by_hand_does(runs, tmp_path, kind, pair):
    options, chosen = runs.PAIRS[pair], runs.KINDS[kind]
    by_lightning, by_hand = runs.fit(tmp_path, options, **chosen), runs.fit_by_hand(options, **chosen)
    assert runs.largest_difference(by_lightning, by_hand) == 0
    assert runs.largest_difference(by_lightning, runs.Module(options)) > 0.1


@pytest.mark.parametrize("pair", fast_for("famo"))
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_rule_learns_from_a_step_that_the_scaler_skips(runs, tmp_path, pair, accumulate):
    chosen = {"precision": "16-mixed", "scale": 2.0**24, "accumulate": accumulate}
    by_lightning = runs.fit(tmp_path, runs.PAIRS[pair], max_epochs=4, **chosen)
    assert runs.largest_difference(by_lightning, runs.fit_by_hand(runs.PAIRS[pair], epochs=4, **chosen)) == 0


# Checkpoints


def end_at(runs, step):
    from lightning.pytorch import Callback

    class End(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == step:
                raise KeyError("end of the test")

    return End()


@pytest.mark.parametrize("pair", fast_for("famo", "dwa"))
@pytest.mark.parametrize("step", [7, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_resumes_in_the_middle_of_an_epoch(runs, tmp_path, pair, step):
    def fit(*callbacks, **chosen):
        module = runs.Module(runs.PAIRS[pair], plain=True)
        batches = runs.Batches(dtype=torch.float64)
        return runs.fit(tmp_path, None, runs.BalanceCallback(), *callbacks, module=module, batches=batches, **chosen)

    with pytest.raises(KeyError, match="end of the test"):
        fit(runs.saving(tmp_path, every_n_train_steps=1), end_at(runs, step))
    assert runs.largest_difference(fit(ckpt_path=tmp_path / "last.ckpt"), fit()) == 0


KILLED = """
import os, signal, sys
import torch
from lightning.pytorch import Callback
from tests.integrations import lightning_runs as runs

class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

folder, pair = sys.argv[1:]
saving = runs.saving(folder, every_n_train_steps=1)
module = runs.Module(runs.PAIRS[pair], plain=True)
runs.fit(folder, None, Kill(), saving, runs.BalanceCallback(), module=module, batches=runs.Batches(dtype=torch.float64))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["famo", "dwa", "uw+cagrad"])
def test_a_killed_run_resumes(runs, tmp_path, pair):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path, pair], env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    module, batches = runs.Module(runs.PAIRS[pair], plain=True), runs.Batches(dtype=torch.float64)
    resumed = runs.fit(tmp_path, None, module=module, batches=batches, ckpt_path=tmp_path / "last.ckpt")
    by_hand = runs.fit_by_hand(
        None, module=runs.Module(runs.PAIRS[pair], plain=True), batches=runs.Batches(dtype=torch.float64)
    )
    assert runs.largest_difference(resumed, by_hand) == 0


@pytest.mark.parametrize("first", ["checkpoint", pytest.param("balance", marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 5}, {"every_n_epochs": 1}, {"monitor": "val"}], ids=str)
def test_an_epoch_is_closed_before_a_checkpoint_is_saved(runs, tmp_path, first, when):
    callbacks = [runs.BalanceCallback(), runs.saving(tmp_path, **when)]
    chosen = {"validation": runs.Batches(2), "max_epochs": 1}
    runs.fit(tmp_path, {"loss": "dwa"}, *(callbacks if first == "balance" else callbacks[::-1]), **chosen)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["balancer.loss_counts"].tolist() == [0, 0, 0]
    assert any("dwa" in name or "rule" in name for name in state if name.startswith("balancer.loss_balancer"))


def test_an_epoch_that_ends_early_is_closed_once(runs, tmp_path):
    class Short(runs.Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    ends = []
    module = Short({"loss": "dwa"})
    module.balancer.loss_balancer.end_epoch = lambda losses: ends.append(losses.isfinite().all().item())
    runs.fit(tmp_path, None, module=module, max_epochs=3)
    assert ends == [True, True]  # the third epoch has not been followed by another one
    assert module.balancer.loss_counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize("limit", [{"limit_train_batches": 3}, {"max_steps": 8, "max_epochs": -1}], ids=str)
def test_an_epoch_ends_with_its_last_batch(runs, tmp_path, limit):
    module = runs.fit(tmp_path, {"loss": "dwa"}, **limit)
    assert module.balancer.loss_counts.tolist() == [0 if "limit_train_batches" in limit else 3] * 3


# Validation losses


COBA = {"loss": "coba", "loss_options": {"warmup": 2}}


def observe_with(runs, folder, callback, **chosen):
    """Observations of a fit that leaves the parameters as they are, and the losses of each validation batch."""
    modes, rows = [], []

    class Watched(runs.Module):
        def task_losses(self, x):
            if not torch.is_grad_enabled():
                modes.append(self.training)
            return super().task_losses(x)

    module = Watched(COBA, plain=True, lr=0.0)
    module.balancer.loss_balancer.observe_validation = lambda losses, context: rows.append(losses)
    batches, validation = runs.Batches(dtype=torch.float64), runs.Batches(3, seed=5, dtype=torch.float64)
    runs.fit(folder, None, callback, module=module, batches=batches, validation=validation, **chosen)
    assert module.training
    assert not any(modes)
    assert not any(row.is_inference() for row in rows)
    with torch.no_grad():
        return rows, [torch.stack([*module.task_losses(batch).values()]) for batch in validation]


def test_a_validation_run_yields_one_observation(runs, tmp_path):
    rows, losses = observe_with(runs, tmp_path, runs.BalanceCallback(), val_check_interval=2, num_sanity_val_steps=1)
    assert len(rows) == 4
    for row in rows:
        torch.testing.assert_close(row, torch.stack(losses).mean(0), rtol=1e-12, atol=0)


def test_observations_every_few_steps_go_through_the_validation_data(runs, tmp_path):
    rows, losses = observe_with(runs, tmp_path, runs.BalanceCallback(validate_every=2), check_val_every_n_epoch=5)
    torch.testing.assert_close(torch.stack(rows), torch.stack([losses[k] for k in (0, 1, 2, 0, 1)]), rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 2])
def test_coba_resumes(runs, tmp_path, every):
    def fit(*callbacks, **chosen):
        chosen |= {"validation": runs.Batches(3, seed=5, dtype=torch.float64), "max_epochs": 4, "val_check_interval": 5}
        module, batches = runs.Module(COBA, plain=True), runs.Batches(dtype=torch.float64)
        callback = runs.BalanceCallback(validate_every=every)
        return runs.fit(tmp_path, None, callback, *callbacks, module=module, batches=batches, **chosen)

    with pytest.raises(KeyError, match="end of the test"):
        fit(runs.saving(tmp_path, every_n_train_steps=1), end_at(runs, 13))
    assert runs.largest_difference(fit(ckpt_path=tmp_path / "last.ckpt"), fit()) == 0


# Metrics


@pytest.mark.parametrize(("log_every", "steps"), [(None, [2, 5, 8]), (2, [1, 3, 5, 7, 9])])
def test_metrics_reach_the_loggers(runs, tmp_path, log_every, steps):
    from lightning.pytorch.loggers import CSVLogger

    logger, rows = CSVLogger(tmp_path), []
    logger.log_metrics = lambda metrics, step: rows.append((step, metrics))
    callback = runs.BalanceCallback(log_every=log_every)
    runs.fit(tmp_path, runs.PAIRS["uw+cagrad"], callback, logger=[logger], log_every_n_steps=3)
    rows = [(step, metrics) for step, metrics in rows if "weight/a" in metrics]
    assert [step for step, _ in rows] == steps
    assert all({"loss/a", "cosine/a__b", "conflicts", "gradient_weight/c"} <= set(metrics) for _, metrics in rows)


# Manual optimisation, several balancers


@pytest.mark.parametrize("is_direct", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_manual_optimisation_with_two_optimizers(runs, tmp_path, is_direct):
    class Manual(runs.Module):
        def __init__(self, options):
            super().__init__(options)
            self.automatic_optimization = False

        def configure_optimizers(self):
            heads = [*self.heads.parameters(), *self.balancer.parameters()]
            return [torch.optim.Adam(self.trunk.parameters(), lr=self.lr), torch.optim.Adam(heads, lr=self.lr)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            given = {"losses": self.task_losses(batch), "shared": self.trunk.parameters()}
            if is_direct:
                self.balancer.backward(**given)
            else:
                self.manual_backward(self.balancer.loss(**given))
            for optimizer in self.optimizers():
                optimizer.step()

    module = runs.fit(tmp_path, None, module=Manual({"loss": "famo", "gradient": "cagrad"}))
    assert runs.largest_difference(module, runs.fit_by_hand({"loss": "famo", "gradient": "cagrad"})) == 0


def test_two_balancers(runs, tmp_path):
    """Each learns from its own losses, and has its own metrics."""

    class Two(runs.Module):
        def __init__(self):
            super().__init__({"loss": "famo"})
            self.second = Balancer(2, loss="famo")
            self.other = nn.Linear(6, 2)

        def second_losses(self, x):
            return self.other(x).square().mean(0)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.second.loss(self.second_losses(batch))

    module = Two()
    functions = {"balancer": Two.task_losses, "second": Two.second_losses}
    logged = []
    module.log_dict = logged.append
    runs.fit(tmp_path, None, runs.BalanceCallback(functions), module=module, log_every_n_steps=1)
    assert {"balancer/loss/a", "second/loss/0"} <= set(logged[0])
    start = Two().state_dict()
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, start[name]) and "rule" in name]
    assert any(name.startswith("second") for name in moved)
    with pytest.raises(ValueError, match="there is one function"):
        runs.fit(tmp_path, None, module=Two())
    with pytest.raises(ValueError, match="Did you mean 'second'"):
        runs.fit(tmp_path, None, runs.BalanceCallback({"secondary": Two.second_losses}), module=Two())


# Errors


def returns_the_sum(self, batch, batch_idx):
    return sum(self.task_losses(batch).values())


def calls_backward(self, batch, batch_idx):
    self.balancer.backward(self.task_losses(batch), shared=self.trunk.parameters())
    return returns_the_sum(self, batch, batch_idx)


def test_a_direct_call_of_backward_is_an_error(runs, tmp_path):
    module = runs.module_with({"gradient": "mgda"}, training_step=calls_backward)
    scaler = module.balancer.scaler = object()
    with pytest.raises(RuntimeError, match=r"Return balancer\.loss"):
        runs.fit(tmp_path, None, module=module, precision="16-mixed")
    assert (module.balancer.scaler, module.balancer.backward_refusal) == (scaler, "")


def test_attributes_of_the_balancer_are_as_before_after_a_fit(runs, tmp_path):
    seen = []

    def training_step(self, batch, batch_idx):
        seen.append((self.balancer.scaler, self.balancer.backward_refusal))
        return runs.Module.training_step(self, batch, batch_idx)

    module = runs.module_with({"gradient": "mgda"}, training_step=training_step)
    runs.fit(tmp_path, None, module=module, precision="16-mixed")
    assert isinstance(seen[0][0], torch.amp.GradScaler)
    assert "automatic optimisation" in seen[0][1]
    assert (module.balancer.scaler, module.balancer.backward_refusal) == (None, "")
    module.balancer.backward(module.task_losses(torch.zeros(2, 6)), shared=module.trunk.parameters())


def test_a_loss_that_does_not_come_from_the_balancer_is_an_error(runs, tmp_path):
    module = runs.module_with({"loss": "uw"}, training_step=returns_the_sum)
    with pytest.raises(RuntimeError, match="does not come from a balancer"):
        runs.fit(tmp_path, None, module=module)
    runs.fit(tmp_path, None, runs.BalanceCallback(every_batch=False), module=module)


def test_a_regulariser_may_be_added_on_one_process(runs, tmp_path):
    def training_step(self, batch, batch_idx):
        return runs.Module.training_step(self, batch, batch_idx) + 0.1 * self.trunk[0].weight.square().sum()

    module = runs.module_with({"gradient": "mgda"}, training_step=training_step)
    runs.fit(tmp_path, None, module=module)
    assert module.balancer.report.conflicts is not None


def trains_the_trunk(self):
    return torch.optim.SGD(self.trunk.parameters(), 0.1)


FAULTS = {
    "no balancer": ({"balancer": nn.Identity()}, {}, "needs a balancer in the LightningModule"),
    "parameters": ({"configure_optimizers": trains_the_trunk}, {"loss": "uw"}, "are in none"),
    "function": ({"task_losses": None}, {"loss": "famo"}, r"Add a method task_losses\(batch\)"),
    "validation": ({}, {"loss": "coba"}, "the fit has no validation"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_fit_lacks_is_an_error_at_its_start(runs, tmp_path, fault):
    changes, options, message = FAULTS[fault]
    methods = {name: change for name, change in changes.items() if name != "balancer"}
    module = runs.module_with(options, **methods, training_step=lambda self, batch, batch_idx: pytest.fail("no training"))
    if "balancer" in changes:
        module.balancer = changes["balancer"]
    with pytest.raises(ValueError, match=message):
        runs.fit(tmp_path, None, module=module)


def test_wrong_arguments(runs):
    with pytest.raises(ValueError, match="log_every must be at least 0"):
        runs.BalanceCallback(log_every=-1)
    with pytest.raises(ValueError, match="validate_every must be at least 1"):
        runs.BalanceCallback(validate_every=0)
    with pytest.raises(TypeError, match="losses must be a function"):
        runs.BalanceCallback({"balancer": 3})
