"""Balancers in the training loop of Lightning: a callback that makes all calls of a balancer except for its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from ..messages import require_package, unknown

if find_spec("lightning") is None:
    require_package("lightning", "lightning")

import torch
from lightning.pytorch import Callback

from ..stage.balancer import Balancer
from ..stage.deferred import leaves_besides_steps
from ..stage.extra_forward import extra_forward
from ._lightning_checks import (
    check_balancers,
    check_functions,
    check_optimizers,
    check_validation,
    check_wrapper,
    exclude_from_wrapper,
    scaler_of,
)
from ._lightning_validation import MeanLosses, ValidationBatches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from ..stage.arguments import Counts
    from ..stage.report import Report

    GivenLosses = Mapping[str, Tensor] | Tensor
    LossFunction = Callable[[LightningModule, Any], GivenLosses | tuple[GivenLosses, Counts]]

_REFUSAL = (
    "balancer.backward(...) must not be called in training_step with automatic optimisation, because Lightning sets .grad to "
    "zero after training_step. Return balancer.loss(...) with the same arguments, or set self.automatic_optimization to False."
)


class _Attached(NamedTuple):
    """A balancer, with its attributes before the fit."""

    balancer: Balancer
    scaler: GradScaler | None
    refusal: str


class BalanceCallback(Callback):  # type: ignore[misc]  # Lightning is not type-checked here
    """Make the calls that the balancers of a LightningModule need; ``training_step`` only returns ``balancer.loss(...)``.

    A balancer is an attribute of the module, ``self.balancer = balance.Balancer(...)``. So Lightning saves its state in every
    checkpoint, and ``self.parameters()`` contains its parameters. The callback does the following:

    * After each optimizer step it passes the losses of the same batch to a rule that learns from them (famo). It does not
      after a step that the gradient scaler has skipped.
    * After the last batch of an epoch it calls ``end_epoch()``, before a ModelCheckpoint saves.
    * It passes losses of validation data to a rule that learns from them (coba).
    * It gives the gradient scaler of ``precision="16-mixed"`` to the balancer, and logs the metrics of its report.
    * It excludes the balancer from the module that DistributedDataParallel wraps. The step is exact.
    * With automatic optimisation, a direct call of ``balancer.backward`` is an error during the fit. So is a loss that does not
      come from a balancer.

    Args:
        losses: A function of the module and a batch that returns losses as ``Balancer.backward`` takes them, or a pair of
            losses and counts. Needed for rules that learn from losses between steps. None: the method ``task_losses(batch)`` of
            the module. If several balancers need losses: functions by the name of the balancer in the module.
        log_every: Number of optimizer steps between two records in all loggers; 0: never. None: together with the metrics of
            the module, every ``Trainer(log_every_n_steps=...)`` steps, by ``module.log_dict``.
        validate_every: Number of optimizer steps between two observations of a rule that learns from validation losses. Each
            gets the losses of one further batch of validation data. None: the mean losses of each validation run.
        every_batch: A loss that does not come from a balancer is an error. False: some batches need no balancer.

    Raises:
        ValueError: If a number is negative.
        TypeError: If ``losses`` is not callable.
    """

    def __init__(
        self,
        losses: LossFunction | Mapping[str, LossFunction] | None = None,
        *,
        log_every: int | None = None,
        validate_every: int | None = None,
        every_batch: bool = True,
    ) -> None:
        functions = losses.values() if isinstance(losses, Mapping) else [] if losses is None else [losses]
        if not all(map(callable, functions)):
            raise TypeError(f"losses must be a function of module and batch, or a dict of such functions, but got {losses!r}.")
        for name, number, least in (("log_every", log_every, 0), ("validate_every", validate_every, 1)):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least} optimizer steps, but got {number}.")
        self.losses, self.log_every, self.validate_every, self.every_batch = losses, log_every, validate_every, every_batch
        self._attached: list[_Attached] = []
        self._open_epoch: int | None = None  # an epoch that has begun, whose end the balancers have not seen
        self._validation = ValidationBatches()
        self._clear()

    def _clear(self) -> None:
        """Forget everything that belongs to one module or batch."""
        self._balancers: dict[str, Balancer] = {}  # by name in the module
        self._functions: dict[str, Callable[[Any], Any]] = {}  # by balancer, the losses of a batch
        self._reports: dict[str, Report | None] = {}  # of the last step of each balancer
        self._batches: dict[str, Any] = {}  # by balancer, the last batch that it has balanced since the optimizer's step
        self._global_step = 0
        self._scale = 0.0  # of the gradient scaler, before the batch
        self._means: dict[str, MeanLosses] = {}  # by balancer, of a validation run
        self._validation.close()

    # Begin and end of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the balancers, before a strategy wraps the module."""
        if stage == "fit":
            if trainer.global_step == 0:  # a trainer can also continue a fit that has ended
                self._open_epoch, self._validation = None, ValidationBatches()
            self._attach(trainer, pl_module)
            exclude_from_wrapper(pl_module, self._balancers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the fit can do what the balancers need."""
        self._attach(trainer, pl_module)
        check_balancers(self._balancers)
        check_optimizers(trainer, self._balancers)
        check_wrapper(trainer, self._balancers)
        self._read_functions(pl_module)
        check_validation(trainer, self._balancers)
        if pl_module.automatic_optimization:
            for balancer in self._balancers.values():
                balancer.backward_refusal = _REFUSAL

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Restore the attributes of the balancers."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Restore the attributes of the balancers."""
        self._detach()

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._balancers = {name: part for name, part in module.named_modules() if isinstance(part, Balancer)}
        known = {id(attached.balancer) for attached in self._attached}
        for balancer in self._balancers.values():
            if id(balancer) not in known:
                self._attached.append(_Attached(balancer, balancer.scaler, balancer.backward_refusal))
                balancer.scaler = scaler_of(trainer) or balancer.scaler

    def _detach(self) -> None:
        for balancer, scaler, refusal in self._attached:
            balancer.scaler, balancer.backward_refusal = scaler, refusal
        self._attached.clear()
        self._clear()

    def _read_functions(self, module: LightningModule) -> None:
        """Read the functions that compute the losses of a batch.

        Raises:
            ValueError: If a name belongs to no balancer, or a function is missing.
        """
        given, method = self.losses, getattr(module, "task_losses", None)
        if isinstance(given, Mapping):
            for name in given:
                if name not in self._balancers:
                    raise ValueError(unknown("balancer in losses", name, self._balancers))
            self._functions = {name: partial(function, module) for name, function in given.items()}
        elif given is not None or method is not None:
            function: Any = method if given is None else partial(given, module)
            self._functions = dict.fromkeys(self._balancers, function)
        check_functions(self._balancers, self._functions, is_by_name=isinstance(given, Mapping))

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Note where the training begins."""
        self._global_step = trainer.global_step
        self._reports = {name: balancer.report for name, balancer in self._balancers.items()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Close an epoch that has ended before its last batch."""
        if self._open_epoch not in (None, trainer.current_epoch):
            self._end_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Note the scale of the gradients, which becomes smaller if the scaler skips a step."""
        self._scale = self._current_scale(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that the backward pass will be a step of a balancer.

        Raises:
            RuntimeError: If it will not.
        """
        if not pl_module.automatic_optimization:
            return
        others = leaves_besides_steps(loss)
        if others is None and self.every_batch:
            raise RuntimeError(
                "training_step must return balancer.loss(...), but its loss does not come from a balancer, which would have no "
                "effect. If some batches need no balancer, use BalanceCallback(every_batch=False)."
            )
        if others and trainer.world_size > 1:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in others[:3])
            raise RuntimeError(
                "With several processes training_step must return only balancer.loss(...), but something is added to it that "
                f"gives parameters a gradient (of shape {shapes}). Use balancer.loss(..., extra=...) for it."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Make the calls that follow an optimizer step, and the end of an epoch."""
        for name, balancer in self._balancers.items():
            if balancer.report is not self._reports.get(name):
                self._reports[name], self._batches[name] = balancer.report, batch
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._after_optimizer_step(trainer, pl_module)
        self._open_epoch = trainer.current_epoch
        if trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches:
            self._end_epoch()

    def _after_optimizer_step(self, trainer: Trainer, module: LightningModule) -> None:
        self._log(trainer, module)
        if self._current_scale(trainer) >= self._scale:  # otherwise the scaler has skipped the step
            self._observe(trainer, module)
        self._batches.clear()
        if self.validate_every is not None and trainer.global_step % self.validate_every == 0:
            self._observe_next_validation_batch(trainer, module)

    def _observe(self, trainer: Trainer, module: LightningModule) -> None:
        """Pass the losses after the step to the rules that learn from them."""
        for name, batch in self._batches.items():
            if self._balancers[name].needs_observation:
                with extra_forward(module):
                    losses, counts = self._losses(trainer, name, batch)
                self._balancers[name].observe(losses, counts=counts)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        """Record the metrics of the balancers that have made a step."""
        if self.log_every is None:
            is_due = trainer._logger_connector.should_update_logs
        else:
            is_due = self.log_every > 0 and trainer.global_step % self.log_every == 0
        if not is_due:
            return
        metrics: dict[str, float] = {}
        for name in self._batches:
            if (report := self._reports[name]) is not None:
                prefix = f"{name}/" if len(self._balancers) > 1 else ""
                metrics |= {f"{prefix}{key}": value for key, value in report.as_metrics().items()}
        if self.log_every is None:
            module.log_dict(metrics)
        elif metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _end_epoch(self) -> None:
        for balancer in self._balancers.values():
            balancer.end_epoch()
        self._open_epoch = None

    def _current_scale(self, trainer: Trainer) -> float:
        """Return the scale of the gradient scaler, if a rule must not learn from a step that the scaler skips."""
        scaler = scaler_of(trainer)
        if scaler is None or not any(balancer.needs_observation for balancer in self._balancers.values()):
            return 0.0
        return float(scaler.get_scale())

    # Losses between the steps

    def _losses(self, trainer: Trainer, name: str, batch: Any) -> tuple[GivenLosses, Counts | None]:
        """Return the losses of a batch, without gradients, and the numbers of samples if they are given."""
        # A rule must not keep tensors of Lightning's inference mode
        with torch.inference_mode(mode=False), torch.no_grad(), trainer.precision_plugin.forward_context():
            result = self._functions[name](batch)
        return result if isinstance(result, tuple) else (result, None)

    # Validation

    def _validated(self) -> Iterator[tuple[str, Balancer]]:
        return ((name, balancer) for name, balancer in self._balancers.items() if balancer.needs_validation)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begin the mean losses of a validation run."""
        self._means = {name: MeanLosses(balancer) for name, balancer in self._validated()}
        self._validation.restart()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Add the losses of a batch to the means of a validation run."""
        if self.validate_every is None and not trainer.sanity_checking:
            for name, means in self._means.items():
                with extra_forward(pl_module):
                    means.add(*self._losses(trainer, name, batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Pass the mean losses of a validation run to the rules that learn from them."""
        if self.validate_every is None and not trainer.sanity_checking:
            for means in self._means.values():
                with torch.inference_mode(mode=False):
                    means.observe()

    def _observe_next_validation_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Pass the losses of one further batch of validation data to the rules that learn from them."""
        if not (validated := dict(self._validated())):
            return
        modes = [(part, part.training) for part in module.modules()]
        with extra_forward(module):
            module.eval()
            try:
                batch = self._validation.next(trainer)
                losses = {name: self._losses(trainer, name, batch) for name in validated}
            finally:
                for part, training in modes:
                    part.training = training
        for name, balancer in validated.items():
            balancer.observe_validation(losses[name][0], counts=losses[name][1])

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch whose end the balancers have not seen, and the place in the validation data."""
        return {"open_epoch": self._open_epoch, "validation_batches": self._validation.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint."""
        self._open_epoch = state_dict["open_epoch"]
        self._validation.drawn = state_dict["validation_batches"]
