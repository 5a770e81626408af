"""Misuse of the balanced Trainer of `balance.integrations.transformers`."""

import json

import pytest
import torch
from transformers import TrainerState

import balance
from tests.integrations.trainers import TASKS, Net, StopAt, StopError, Trainer, make, rows


class ReturnsSum(Trainer):
    def compute_loss(self, *args, **keywords):
        return sum(super().compute_loss(*args, **keywords).values())


class CallsBackward(Trainer):
    def compute_loss(self, *args, **keywords):
        losses = super().compute_loss(*args, **keywords)
        self.balancer.backward(losses, shared=self.model.trunk.parameters())
        return losses


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class Unknown(Trainer):
    def compute_loss(self, *args, **keywords):
        return {"c": super().compute_loss(*args, **keywords)["a"]}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (ReturnsSum, TypeError, "must return the task losses by name, but got Tensor"),
        (CallsBackward, RuntimeError, "balancer.backward was called directly"),
        (OwnStep, RuntimeError, "must be computed inside of BalancedTrainer.training_step"),
        (Unknown, ValueError, "Unknown task 'c'"),
    ],
)
def test_wrong_losses_are_errors_and_the_balancer_is_free_afterwards(tmp_path, kind, error, message):
    trainer = make(tmp_path, kind=kind)
    with pytest.raises(error, match=message):
        trainer.train()
    assert not trainer.balancer.backward_refusal
    assert trainer.balancer.scaler is None


def test_an_error_within_a_collection_leaves_none_open(tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=2, trainer_options={"collect": True})
    trainer.add_callback(StopAt(1))
    with pytest.raises(StopError):
        trainer.train()
    assert trainer.balancer.collection is None


def test_an_optimizer_without_the_balancer_is_an_error(tmp_path):
    plain = make(tmp_path)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    options = {"balancer": plain.balancer, "shared": plain.model.trunk.parameters(), "optimizers": (optimizer, None)}
    with pytest.raises(ValueError, match="optimizer must train the parameters of the balancer"):
        Trainer(plain.model, plain.args, train_dataset=rows(), **options).train()


def test_a_step_outside_of_train_is_an_error(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match="inside of train"):
        trainer.training_step(trainer.model, {"x": torch.ones(2, 4), "labels": torch.ones(2, 2)})


def test_a_trainer_whose_callback_was_removed_is_an_error(tmp_path):
    trainer = make(tmp_path)
    trainer.remove_callback(trainer._events)
    with pytest.raises(RuntimeError, match="own callback in place"):
        trainer.train()


def test_a_step_out_of_memory_leaves_no_collection(tmp_path):
    """As with auto_find_batch_size, which begins again with smaller batches."""
    trainer = make(tmp_path, trainer_options={"collect": True})
    compute = trainer._task_losses

    def out_of_memory(*args, **keywords):
        trainer._task_losses = compute
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer._task_losses = out_of_memory
    with trainer._events.training(None):
        trainer.create_optimizer()
        trainer._events.on_train_begin()
        with pytest.raises(torch.OutOfMemoryError):
            trainer.training_step(trainer.model, {"x": torch.ones(2, 4), "labels": torch.ones(2, 2)})
        assert trainer.balancer.collection is None
        trainer.current_gradient_accumulation_steps = 1
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.training_step(trainer.model, {"x": torch.ones(2, 4), "labels": torch.ones(2, 2)})
    assert trainer.balancer.report is not None


def test_a_checkpoint_without_balancer_is_an_error(tmp_path):
    keywords = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, **keywords).train()
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-2" / "trainer_state.json"))
    assert "conflicts" in json.dumps(state.log_history)
    (tmp_path / "checkpoint-2" / "balancer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"balancer\.pt does not exist"):
        make(tmp_path, **keywords).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"optim": "adalomo"}, "updates the parameters during the backward pass"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["trunk"]}, "during the backward pass"),
        ({"trainer_options": {"balancer_lr": 0.1}, "is_inside": True}, "balancer_lr and a balancer inside"),
    ],
)
def test_combinations_that_cannot_work_are_errors(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **keywords)


def test_declared_scaling_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be means of a micro-batch"):
        make(tmp_path, kind=type("Scaled", (Trainer,), {"loss_is_scaled_for_ga": True}))


def test_a_fixed_list_of_parameters_does_not_fit_new_models(tmp_path):
    balancer, args = balance.Balancer(TASKS), make(tmp_path).args
    with pytest.raises(ValueError, match="shared=lambda model"):
        Trainer(None, args, model_init=lambda trial=None: Net(), balancer=balancer, shared=Net().parameters())
