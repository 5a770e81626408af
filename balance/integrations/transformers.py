"""Hugging Face Trainer that trains on task losses, which a balancer combines."""

from __future__ import annotations

from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..messages import require_package

if find_spec("transformers") is None:
    require_package("transformers", "transformers")

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ._optimizers import untrained_parameters
from ._task_losses import TaskLosses, read_task_losses
from ._trainer_evaluation import EvaluationLosses
from ._trainer_events import STATE_FILE, Batch, TrainerEvents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from ..stage.balancer import Balancer

    Shared = Iterable[Tensor] | Callable[[Any], Iterable[Tensor]]

_Base: Any = object  # the trainer comes after the mixin in the order of the base classes

__all__ = ["BalancedTrainer", "BalancedTrainerMixin", "TaskLosses"]


class BalancedTrainerMixin(_Base):  # type: ignore[misc]
    """Balance the task losses in a Trainer, also in a subclass of ``Trainer`` by somebody else.

    ``compute_loss`` (a method of the trainer, the argument ``compute_loss_func``, or the model's own ``loss``) returns the
    losses by task as a dict, or as `TaskLosses`. Each is a mean over the samples or tokens of the micro-batch. So
    ``num_items_in_batch`` is always None there, and the Trainer divides the gradient by the number of micro-batches.

    The trainer puts the parameters of the balancer into the optimizer, without weight decay, and clears their gradients. It
    observes the losses after each optimizer step and the validation losses of each evaluation, if a rule needs them, and closes
    epochs. It saves the state of the balancer as ``balancer.pt`` in every checkpoint, loads it on resume and with the best
    model, and logs `Report.as_metrics`. An evaluation reports the plain sum as ``eval_loss`` and each task as
    ``eval_loss_TASK``. ``max_grad_norm`` clips the gradients of the model.

    Args:
        *args: Arguments of the trainer.
        balancer: The balancer, outside of the model or a submodule of it.
        shared: Parameters that the tasks share, or a function of the model that returns them, which ``model_init`` needs.
        collect: With accumulation: make the exact step of all micro-batches of an optimizer step, as `Balancer.collect`
            does. Otherwise each micro-batch is balanced separately, and the directions are averaged.
        balancer_lr: Learning rate of the balancer's parameters; None: the learning rate of the model.
        **keywords: Keyword arguments of the trainer.

    Raises:
        ValueError: If an argument cannot be combined with a balancer.
        ImportError: If the version of transformers is too old.
    """

    compute_loss: Any

    def __init__(
        self,
        *args: Any,
        balancer: Balancer,
        shared: Shared | None = None,
        collect: bool = False,
        balancer_lr: float | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        self.balancer, self._balancer_lr = balancer, balancer_lr
        self._task_losses: Any = self.compute_loss  # of the class of the user
        self.compute_loss = self._compute_loss
        self._events = TrainerEvents(self, balancer, shared, self._losses_of, collect=collect)
        self._evaluation = EvaluationLosses(self, balancer)
        self._check(shared)
        self.loss_is_scaled_for_ga = False  # task losses are means of a micro-batch
        self.model_accepts_loss_kwargs = False  # the model must not divide them by the number of all tokens
        self.add_callback(self._events)

    def _check(self, shared: Shared | None) -> None:
        """Check the combination with the Trainer's arguments."""
        if not hasattr(self, "loss_is_scaled_for_ga"):
            raise ImportError("BalancedTrainer needs transformers 5.24 or newer, whose Trainer has loss_is_scaled_for_ga.")
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        is_inside = self._events.is_inside()
        reasons = {
            "loss_is_scaled_for_ga=True: the task losses must be means of a micro-batch": bool(self.loss_is_scaled_for_ga),
            f"optim={optimizer!r}, which updates the parameters during the backward pass": (
                "lomo" in optimizer or "layerwise" in optimizer
            ),
            "DeepSpeed, which runs the backward pass itself": bool(self.is_deepspeed_enabled),
            "model_init and a list of shared parameters. Give a function: shared=lambda model: ...": (
                self.model_init is not None and shared is not None and not callable(shared)
            ),
            "several processes and a balancer inside of the model, which DistributedDataParallel would wrap": (
                is_inside and self.args.world_size > 1
            ),
            "balancer_lr and a balancer inside of the model. Take the balancer out of the model": (
                is_inside and self._balancer_lr is not None
            ),
        }
        for reason, is_met in reasons.items():
            if is_met:
                raise ValueError(f"BalancedTrainer cannot be combined with {reason}.")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **keywords: Any) -> Any:
        """Train as ``Trainer.train`` does. During the training a direct call of ``balancer.backward`` is an error.

        Args:
            resume_from_checkpoint: As for ``Trainer.train``.
            *args: As for ``Trainer.train``.
            **keywords: As for ``Trainer.train``.

        Returns:
            As ``Trainer.train``.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        with self._events.training(checkpoint):
            return super().train(resume_from_checkpoint, *args, **keywords)

    def create_optimizer(self, *args: Any, **keywords: Any) -> Any:
        """Create the optimizer of the Trainer, with the balancer's parameters in a further group without weight decay."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **keywords)
        missing = [self.balancer.get_parameter(name) for name in untrained_parameters(self.balancer, [optimizer])]
        if is_new and missing:
            rate = {} if self._balancer_lr is None else {"lr": self._balancer_lr}
            optimizer.add_param_group({"params": missing, "weight_decay": 0.0, **rate})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay; the parameters of the balancer have none."""
        own = {id(parameter) for parameter in self.balancer.parameters()}
        inside = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        return [name for name in super().get_decay_parameter_names(model) if name not in inside]

    def training_step(self, *args: Any, **keywords: Any) -> Tensor:
        """Run the forward and backward pass of a micro-batch."""
        with self._events.step():
            loss: Tensor = super().training_step(*args, **keywords)
            return loss

    def prediction_step(self, *args: Any, **keywords: Any) -> Any:
        """Run an evaluation step, and record the task losses."""
        with self._evaluation.step():
            return super().prediction_step(*args, **keywords)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,  # noqa: FBT001
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run the evaluation loop, and add the mean loss of each task to its metrics."""
        with self._evaluation.loop() as losses:
            output = super().evaluation_loop(
                dataloader,
                description,
                prediction_loss_only=prediction_loss_only,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        output.metrics.update({f"{metric_key_prefix}_loss_{task}": value for task, value in losses.means().items()})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **keywords: Any) -> dict[str, float]:
        """Evaluate as ``Trainer.evaluate`` does. During training the rules see the losses of the own ``eval_dataset``.

        Args:
            eval_dataset: As for ``Trainer.evaluate``.
            *args: As for ``Trainer.evaluate``.
            **keywords: As for ``Trainer.evaluate``.

        Returns:
            The metrics.
        """
        is_validation = eval_dataset is None and self._events.is_training and self.balancer.needs_validation
        with self._evaluation.validation(is_observed=is_validation):
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **keywords)
        return metrics

    def save_model(self, output_dir: str | None = None, *args: Any, **keywords: Any) -> None:
        """Save the model, and next to it the state of the balancer.

        Args:
            output_dir: As for ``Trainer.save_model``.
            *args: As for ``Trainer.save_model``.
            **keywords: As for ``Trainer.save_model``.
        """
        super().save_model(output_dir, *args, **keywords)
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.balancer.state_dict(), folder / STATE_FILE)

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """Log, together with the losses and weights of the last step.

        Args:
            logs: As for ``Trainer.log``.
            *args: As for ``Trainer.log``.
            **keywords: As for ``Trainer.log``.
        """
        report = self.balancer.report
        if "loss" in logs and report is not None:
            logs.update(report.as_metrics())
        super().log(logs, *args, **keywords)

    def _losses_of(self, model: nn.Module, inputs: Any) -> TaskLosses:
        return read_task_losses(self._task_losses(model, copy(inputs)), self.balancer.tasks, "compute_loss")

    def _compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,  # noqa: FBT001, FBT002
        **_: Any,  # num_items_in_batch, which the task losses do not need
    ) -> Any:
        """Return the scalar that the Trainer expects, given the task losses of the user.

        Raises:
            RuntimeError: If a training step of the user goes past the balancer.
        """
        batch = Batch(model, copy(inputs))
        returned, outputs = self._task_losses(model, inputs, return_outputs=return_outputs), None
        if return_outputs:
            returned, outputs = returned
        losses = read_task_losses(returned, self.balancer.tasks, "compute_loss")
        if self._events.is_stepping:
            value = self._events.balanced(batch, losses)
        elif self._events.is_training and torch.is_grad_enabled():
            raise RuntimeError(
                "During training the losses must be computed inside of BalancedTrainer.training_step, which balances them, but "
                "compute_loss was called elsewhere. Call super().training_step(...), or use torch.no_grad()."
            )
        else:
            self._evaluation.note(losses)
            value = losses.total(self.args.device)
        return (value, outputs) if return_outputs else value


class BalancedTrainer(BalancedTrainerMixin, Trainer):  # type: ignore[misc]
    """Trainer of Hugging Face whose task losses a balancer combines; see `BalancedTrainerMixin`."""
