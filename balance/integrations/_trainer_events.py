"""Calls of a balancer at the events of a Hugging Face Trainer."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback

from ..stage.arguments import read_losses
from ..stage.extra_forward import extra_forward
from ._optimizers import untrained_parameters
from ._task_losses import TaskLosses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from ..stage.balancer import Balancer

STATE_FILE = "balancer.pt"
REFUSAL = (
    "Inside of a BalancedTrainer the Trainer runs the backward pass, but balancer.backward was called directly. "
    "Return the task losses by name from compute_loss."
)


class Batch(NamedTuple):
    """Inputs of a training batch, and the model that computes their losses."""

    model: nn.Module
    inputs: Any


class TrainerEvents(TrainerCallback):  # type: ignore[misc]
    """The balancer of a Trainer, called before, during and after its steps.

    Args:
        trainer: The trainer.
        balancer: The balancer.
        shared: Shared parameters, or a function of the model that returns them; see `BalancedTrainerMixin`.
        task_losses: Function (model, inputs) that returns the losses of a batch.
        collect: Make one step of all micro-batches of an optimizer step.
    """

    def __init__(
        self,
        trainer: Any,
        balancer: Balancer,
        shared: Iterable[Tensor] | Callable[[Any], Iterable[Tensor]] | None,
        task_losses: Callable[[nn.Module, Any], TaskLosses],
        *,
        collect: bool,
    ) -> None:
        self._trainer, self._balancer, self._task_losses, self._collect = trainer, balancer, task_losses, collect
        self._shared = shared if callable(shared) or shared is None else list(shared)
        self._parameters: list[Tensor] | None = None  # the shared parameters of the current training
        self._checkpoint: str | None = None
        self._collection: Any = None  # the open context of balancer.collect()
        self._window: list[Batch] = []  # batches whose losses are to be observed
        self._initial = {name: value.clone() for name, value in balancer.state_dict().items()}
        self.is_training = False
        self.is_stepping = False

    @contextmanager
    def training(self, checkpoint: str | None) -> Iterator[None]:
        """Prepare the balancer for a training, and put its settings back afterwards.

        Args:
            checkpoint: Folder of the checkpoint from which the training resumes, if any.

        Yields:
            Nothing.
        """
        balancer = self._balancer
        settings = balancer.backward_refusal, balancer.scaler
        self._checkpoint, self.is_training = checkpoint, True
        if checkpoint is None and self._trainer.model_init is not None:
            balancer.load_state_dict(self._initial)  # a new model begins
        balancer.backward_refusal = REFUSAL
        try:
            yield
        finally:
            self._discard()
            self.is_training = False
            balancer.backward_refusal, balancer.scaler = settings

    @contextmanager
    def step(self) -> Iterator[None]:
        """Balance the losses of a micro-batch. The last micro-batch of an optimizer step closes the collection.

        Yields:
            Nothing.

        Raises:
            RuntimeError: If the trainer is not in ``train``.
        """
        if not self.is_training or self not in self._trainer.callback_handler.callbacks:
            raise RuntimeError(
                "A BalancedTrainer must make its steps inside of train(), with its own callback in place, but a step was made "
                "without. The balancer's parameters would not be trained. Call trainer.train()."
            )
        if self._collect and self._collection is None:
            self._window.clear()
            self._collection = self._balancer.collect()
            self._collection.__enter__()
        self.is_stepping = True
        try:
            yield
        except BaseException:
            self._discard()
            raise
        finally:
            self.is_stepping = False
        if self._collect and self._trainer.accelerator.sync_gradients:
            collection, self._collection = self._collection, None
            collection.__exit__(None, None, None)

    def balanced(self, batch: Batch, losses: TaskLosses) -> Tensor:
        """Return the scalar whose backward pass the Trainer runs.

        Args:
            batch: The batch.
            losses: Its losses.

        Returns:
            Their plain sum. Shape ().
        """
        device = self._trainer.args.device
        if self._balancer.needs_observation:
            if not self._collect:
                self._window.clear()
            self._window.append(batch)
        arguments = {"shared": self._parameters, **losses.arguments}
        if not self._collect:
            return self._balancer.loss(dict(losses), **arguments).to(device)
        total = losses.total(device).detach()
        self._balancer.backward(dict(losses), **arguments)
        return total.requires_grad_()  # its own backward pass has no effect

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Check the optimizer, load the state of a checkpoint, and use the gradient scaler."""
        self._discard()  # auto_find_batch_size may have begun anew
        trainer, balancer = self._trainer, self._balancer
        if missing := untrained_parameters(balancer, [trainer.optimizer]):
            raise ValueError(
                f"The optimizer must train the parameters of the balancer, but {missing} are not among its parameters. "
                "Add balancer.parameters() to the optimizer, or let the Trainer create the optimizer."
            )
        if self._checkpoint is not None:
            self._load(self._checkpoint)
        balancer.scaler = trainer.accelerator.scaler
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._parameters = list(self._shared(model)) if callable(self._shared) else self._shared
        self._clear_gradients()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Clear the gradients of the balancer, and let its rules learn from the losses after the step."""
        self._clear_gradients()
        if self._balancer.needs_observation and not self._trainer.accelerator.optimizer_step_was_skipped:
            self._observe()
        self._window.clear()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        """Close the epoch after its last step, so that every later checkpoint contains the closed epoch."""
        if float(state.epoch).is_integer():
            self._balancer.end_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Close an epoch that has ended early, or whose length is unknown, unless training stops within it."""
        self._discard()
        if self._balancer.loss_counts.any() and not control.should_training_stop:
            self._balancer.end_epoch()

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Load the state of the balancer that belongs to the best model, if the Trainer has loaded that model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)

    def is_inside(self) -> bool:
        """Return whether the balancer is a submodule of the model."""
        return any(module is self._balancer for module in self._trainer.model.modules())

    def _load(self, checkpoint: str) -> None:
        path = Path(checkpoint) / STATE_FILE
        if path.is_file():
            self._balancer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif not self.is_inside():  # else the state has come with the model
            raise FileNotFoundError(
                f"A checkpoint must contain the state of the balancer, but {path} does not exist. Resume from a checkpoint of "
                "a BalancedTrainer, or load the model only and begin a new training."
            )

    def _clear_gradients(self) -> None:
        """Set the gradients of the balancer to None; the Trainer clears the gradients of the model only."""
        for parameter in self._balancer.parameters():
            parameter.grad = None

    def _observe(self) -> None:
        balancer = self._balancer
        sums = torch.zeros(2, len(balancer.tasks), dtype=torch.float64, device="cpu")  # of losses, and of samples
        with extra_forward(self._window[0].model), torch.no_grad(), self._trainer.compute_loss_context_manager():
            by_batch = [self._task_losses(model, inputs) for model, inputs in self._window]
        for losses in by_batch:
            step = read_losses(dict(losses), balancer.tasks, balancer.nan, balancer.zero, losses.counts)
            counts = torch.tensor(step.counts, dtype=torch.float64, device="cpu")
            sums[0, step.indices] += counts * step.host
            sums[1, step.indices] += counts
        means = {task: total / count for task, total, count in zip(balancer.tasks, *sums, strict=True) if count > 0}
        balancer.observe(means, counts=dict(zip(balancer.tasks, sums[1].tolist(), strict=True)))

    def _discard(self) -> None:
        """Close an open collection without a step."""
        if self._collection is not None:
            collection, self._collection = self._collection, None
            error = RuntimeError("The collection is discarded.")
            collection.__exit__(type(error), error, None)
        self._window.clear()
