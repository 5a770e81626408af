"""The Balancer, the one stage between the task losses and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.engine.custom_functions import refuse_sharded
from balance.engine.engine import Engine, Estimate
from balance.engine.partition import Partition, partition_graph, read_features, read_shared
from balance.rules.build import build_gradient_balancer, build_loss_balancer, warn_of_pairing
from balance.rules.casting import preserving
from balance.rules.options import check_type, describe
from balance.rules.snapshot import Snapshot
from balance.rules.task_names import check_tasks, encode_tasks
from balance.stage.arguments import NanPolicy, StepLosses, ZeroPolicy, check_factor, read_losses, task_names
from balance.stage.ordinary_backward import NotFiniteError
from balance.stage.own_gradients import OwnGradients, restore
from balance.stage.plain_step import Outcome, leave_to_scaler, seed_of, take_plain_step
from balance.stage.reminders import Reminders
from balance.stage.step import BalancedStep
from balance.types import EngineChoice, GradientRule, Heads, LossRule, Memory, Scale, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from balance.rules.protocol import GradientBalancer, JacobianBalancer, LossBalancer
    from balance.stage.report import Report

    Features = Tensor | Sequence[Any] | Mapping[str, Any]

_DEFAULTS = {"source": "parameters", "scale": "paper", "nan": "error", "zero": "present"}


class Balancer(nn.Module):
    """A loss balancer and a gradient balancer, composed, in place of ``losses.sum().backward()``.

    The stage is an ``nn.Module``: its ``parameters()`` belong in the optimizer and its ``state_dict()`` in the checkpoint.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...).
        loss: Name of a registered loss balancer, or several names, which are applied from left to right, or any
            differentiable callable (K,) -> (K,).
        gradient: Name of a registered gradient balancer, or any callable from a Gramian (K, K) to weights (K,). None: one
            ordinary backward pass of the sum of the weighted losses.
        loss_options: Options of a registered loss balancer; of several, options by name.
        gradient_options: Options of a registered gradient balancer.
        source: Tensors on which conflict is measured: the shared ``"parameters"``, or the ``"features"`` that they compute.
            With features every sample counts separately, and one backward pass goes through the trunk instead of K.
        heads: Task-specific parameters get the gradients of the weighted losses unchanged (``"unweighted"``) or times the
            gradient balancer's weights (``"weighted"``). None: as in the paper code of the gradient balancer.
        scale: Length of the direction. ``"paper"``: as the method's paper defines it. ``"sum"``: the weights are rescaled to
            sum to K. ``"norm"``: the length of the summed gradient of the weighted losses, so that the learning rate keeps
            its meaning.
        seed: Seed of the rules that draw random numbers; the two rules draw different numbers.
        nan: Meaning of a loss of NaN: an ``"error"``, or a task that is ``"absent"`` from the step.
        zero: Meaning of a loss of exactly zero. ``"present"``: an ordinary loss. ``"absent"``: the task has no labels in this
            batch and is absent from the step. The gradient balancer then also leaves out a task whose gradient of all shared
            parameters is exactly zero.
        engine: Order of the K backward passes. ``"loop"``: one after the other. ``"batched"``: all in one batch, which keeps
            K gradients of the activations. It uses ``features`` at every step, so that only the trunk is batched. Where an
            operation cannot be batched, it falls back to the loop with a warning. ``"auto"``: batched on an accelerator, if
            ``features`` are given and the trunk has more parameters than activations, else the loop.
        memory: Gradients of the shared parameters that are kept. ``"jacobian"``: all of them, at most K times as many numbers
            as shared parameters. For a linear or convolutional layer whose batch is smaller than its weight, only the
            gradients of its outputs are kept, which suffice. ``"gramian"``: at most 0.4 times as many numbers, or the gradients
            of the largest parameter. The passes are repeated for parts of the parameters, and a weighted backward pass follows.

    Raises:
        ValueError: If a name, an option or a choice is unknown, or the task names are not distinct.
        TypeError: If an option has the wrong type.
    """

    loss_sums: Tensor
    loss_counts: Tensor
    stretch: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int,
        loss: str | Sequence[str] | LossRule = "ls",
        gradient: str | GradientRule | None = None,
        *,
        loss_options: Mapping[str, Any] | None = None,
        gradient_options: Mapping[str, Any] | None = None,
        source: Source = "parameters",
        heads: Heads | None = None,
        scale: Scale = "paper",
        seed: int = 0,
        nan: NanPolicy = "error",
        zero: ZeroPolicy = "present",
        engine: EngineChoice = "auto",
        memory: Memory = "jacobian",
    ) -> None:
        super().__init__()
        _check_choices(source, heads, scale, nan, zero, engine, memory)
        self.tasks = task_names(tasks)
        self.source, self.scale, self.nan, self.zero = source, scale, nan, zero
        self._descriptions = describe(loss, loss_options), _description(gradient, gradient_options)
        K = len(self.tasks)
        self.loss_balancer: LossBalancer = build_loss_balancer(loss, loss_options, K, 2 * seed)
        self.gradient_balancer: GradientBalancer | JacobianBalancer | None = None
        if gradient is not None:
            self.gradient_balancer = build_gradient_balancer(gradient, gradient_options, K, 2 * seed + 1)
        elif gradient_options:
            raise ValueError(f"gradient_options need a gradient balancer, but got {dict(gradient_options)} and gradient=None.")
        self.heads: Heads = heads or ("unweighted" if self.gradient_balancer is None else self.gradient_balancer.heads)
        if self.gradient_balancer is not None and self.gradient_balancer.sees == "jacobian":
            _check_jacobian_balancer(self._descriptions[1], self.heads, scale, memory)
        self.engine = Engine(engine, memory)
        self.reminders = Reminders(self._descriptions[0])
        warn_of_pairing(loss, gradient, K)
        # Sums of the losses of the epoch, for rules that update once per epoch
        self.register_buffer("loss_sums", torch.zeros(K, dtype=torch.float64, device="cpu"))
        self.register_buffer("loss_counts", torch.zeros(K, dtype=torch.int64, device="cpu"))
        # Factor of ``scale`` on the last direction, for steps that reuse its weights
        self.register_buffer("stretch", torch.ones((), dtype=torch.float64, device="cpu"))
        self._skipped = False  # whether the gradient scaler was to skip the last step
        self._own_gradients = OwnGradients()

    @property
    def needs_observation(self) -> bool:
        """True if `observe` must be called after each optimizer step."""
        return self.loss_balancer.needs_observation

    def backward(
        self,
        losses: Mapping[str, Tensor] | Tensor,
        *,
        shared: Iterable[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | Mapping[str, Any] | None = None,
        measure: Iterable[Tensor] | None = None,
        scaler: GradScaler | None = None,
        factor: float = 1.0,
    ) -> Report:
        """Balance the losses and add the result to ``.grad`` of every parameter, like ``losses.sum().backward()``.

        The graph is freed. A parameter that no task reaches keeps its ``.grad``, None included; frozen parameters are no
        error. Without a gradient balancer this is one ordinary backward pass, whose gradients are not checked. A hook on a
        tensor inside the graph acts once in the backward pass of each task. A hook on a parameter, or on its ``.grad``, acts
        once, on the final gradient. Where no shared parameter requires a gradient, all gradient weights are one.

        Parameters of the balancer itself get the gradient of the plain sum of the weighted losses. Once an optimizer has used
        that gradient, the next step begins anew, even if nobody has set the gradient to zero. If a step fails, ``.grad`` and
        the state of all rules are as before.

        A gradient balancer walks the graph once for each task. Where that is impossible (reentrant checkpoints, functions that
        add to ``.grad`` themselves, compiled functions with donated buffers) an error names the cause and the remedy. At the
        first step a graph with custom or compiled functions is walked twice more, to check that the gradients repeat.

        Args:
            losses: One scalar per task, by name; tasks that are absent from this step are left out. Or a tensor of shape
                (K,). Given a dict, or the output of ``torch.stack``, each task's backward pass visits only the graph of its
                loss.
            shared: Parameters that the tasks share. All others that the losses reach are task-specific heads. Needed with
                ``source="parameters"`` and a gradient balancer. A task that reaches none of them takes no part in the
                gradient balancer. Its head is trained with weight one, and ``report.unshared`` names the task.
            features: The shared representation: one tensor, or several in sequences or dicts, of which a task may use some.
                With ``source="features"`` conflict is measured only on them, even where a path from a loss to a shared
                parameter goes around them. With ``source="parameters"`` a hint: passes that all tasks can share begin there.
            measure: Some of the shared parameters, for example of the last layers. Conflict is measured only on them, and the
                passes stop there. The resulting weights apply to the gradients of all shared parameters, in one further
                backward pass. An approximation: ``report.gramian`` is the Gramian of these parameters. A rule that fixes the
                length of its direction (nashmtl), and ``scale="norm"``, get that length for all shared parameters, by one or
                two further passes.
            scaler: The GradScaler of mixed-precision training; give unscaled losses. The gradients are left scaled, for
                ``scaler.step``. A step with an infinite or NaN loss or gradient is left for the scaler to skip.
            factor: Positive factor on all gradients that are added to ``.grad``; for accumulation over n micro-batches 1 / n.
                The rules see the losses without it.

        Returns:
            The record of the step.

        Raises:
            ValueError: If a loss has the wrong shape or name, or a loss or gradient is not finite. Also if the losses do not
                reach the shared parameters or features. ``.grad`` is then as before.
            TypeError: If a loss is not a tensor, or ``shared`` is not an iterable of parameters.
            RuntimeError: If several processes train together, or the graph cannot be walked once for each task.
        """
        return self._step(losses, shared, features, measure, scaler, factor)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # tracing the stage is slow and fails
    @torch.enable_grad()  # as loss.backward(), which works inside no_grad() too
    def _step(
        self,
        losses: Mapping[str, Tensor] | Tensor,
        shared: Iterable[Tensor] | None,
        features: Features | None,
        measure: Iterable[Tensor] | None,
        scaler: GradScaler | None,
        factor: float,
    ) -> Report:
        _refuse_several_processes()
        check_factor(factor)
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        step = read_losses(losses, self.tasks, self.nan, self.zero)
        parameters = list(self.parameters())
        parts = self._partition(step, shared, features, measure, parameters)
        self._skipped = False
        if bad := step.not_finite():
            if scaler is None:
                raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
            outcome = leave_to_scaler(step, scaler, parameters)
        elif not step.losses.requires_grad:
            raise ValueError("No loss requires a gradient. Compute the losses with gradients enabled and do not detach them.")
        else:
            outcome = self._take(step, parts, scaler, factor, parameters)
        self._skipped = outcome.skipped
        self._own_gradients.remember(parameters, skipped=outcome.skipped)
        return outcome.report

    def _take(
        self, step: StepLosses, parts: Partition | None, scaler: GradScaler | None, factor: float, parameters: Sequence[Tensor]
    ) -> Outcome:
        """Take a step with finite losses; if it fails or the scaler will skip it, the state of all rules is as before."""
        state, stretch = Snapshot(self.loss_balancer, self.gradient_balancer), self.stretch.clone()
        gradients = self._own_gradients.clear_used(parameters)
        try:
            with torch.autocast(step.losses.device.type, enabled=False):  # half precision is too coarse for the direction
                outcome = self._outcome(step, parts, scaler, factor)
        except BaseException as error:
            state.restore()
            self.stretch.copy_(stretch)
            restore(gradients)
            if scaler is None or not isinstance(error, NotFiniteError):
                raise
            return leave_to_scaler(step, scaler, parameters)
        if outcome.skipped:  # no rule must learn from such a step
            state.restore()
        else:
            present = step.context.present
            tasks = slice(None) if present is None else present  # a slice is faster than indices
            self.loss_sums[tasks] += step.host.to(self.loss_sums)
            self.loss_counts[tasks] += 1
            self.reminders.after_step(self.loss_balancer)
        return outcome

    def _outcome(self, step: StepLosses, parts: Partition | None, scaler: GradScaler | None, factor: float) -> Outcome:
        if self.gradient_balancer is None or parts is None:
            return take_plain_step(self.loss_balancer, step, scaler, factor)
        seed = seed_of(step, scaler)
        return Outcome(BalancedStep(self, self.gradient_balancer, step, parts, seed, factor).run())

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor] | Tensor) -> None:
        """Pass the losses of the same batch after the optimizer's step to a rule that learns from them (famo).

        Args:
            losses: As for `backward`, of the same tasks.

        Raises:
            ValueError: If a loss is not finite or out of the rule's domain; the rule's state is then as before.
        """
        if not self.needs_observation or self._skipped:
            return
        step = read_losses(losses, self.tasks, self.nan, self.zero)
        if bad := step.not_finite():
            raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
        self.loss_balancer.observe(step.losses, step.context)
        self.reminders.observed()

    def end_epoch(self) -> None:
        """Close an epoch: rules that update once per epoch get its mean losses, NaN for a task that was never present."""
        self.reminders.epoch_ended()
        self.loss_balancer.end_epoch(self.loss_sums / self.loss_counts)
        self.loss_sums.zero_()
        self.loss_counts.zero_()

    def estimate(
        self,
        shared: Iterable[Tensor] | None = None,
        *,
        features: Features | None = None,
        measure: Iterable[Tensor] | None = None,
    ) -> Estimate:
        """Return the memory that a step will need beyond ``losses.sum().backward()``, before any step is made.

        Args:
            shared: As for `backward`.
            features: With ``source="features"``: the features, or tensors of their shapes and types.
            measure: As for `backward`.

        Raises:
            ValueError: If an argument is missing or empty.
            TypeError: If an argument contains something other than parameters.
        """
        if self.gradient_balancer is None:
            return Estimate(0, 0, 0)
        if self.source == "features":
            inputs = trunk = read_features(features, computed=False)
        else:
            trunk = read_shared(shared)
            inputs = trunk if measure is None else read_shared(measure, "measure")
        return self.engine.estimate(inputs, trunk, len(self.tasks), in_blocks=self.source == "parameters")

    def get_extra_state(self) -> Tensor:
        """Return the names of the tasks, so that a checkpoint is not loaded into a stage for others. Shape (n,), uint8."""
        return encode_tasks(self.tasks)

    def set_extra_state(self, state: Tensor) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from the tasks of this stage.
        """
        check_tasks(state, self.tasks, "Balancer")

    def __repr__(self) -> str:
        loss, gradient = self._descriptions
        chosen = [f"{name}={getattr(self, name)!r}" for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        engine = {"engine": (self.engine.choice, "auto"), "memory": (self.engine.memory, "jacobian")}
        chosen += [f"{name}={value!r}" for name, (value, default) in engine.items() if value != default]
        return f"Balancer({', '.join([repr(self.tasks), f'loss={loss}', f'gradient={gradient}', *chosen])})"

    def _partition(
        self,
        step: StepLosses,
        shared: Iterable[Tensor] | None,
        features: Features | None,
        measure: Iterable[Tensor] | None,
        parameters: Sequence[Tensor],
    ) -> Partition | None:
        """Return shared parameters, heads and features, checked; None without a gradient balancer."""
        if self.gradient_balancer is None:
            _check_unused(shared, features, measure)
            return None
        parts = partition_graph(self.source, step.roots, shared, features, measure, parameters)
        refuse_sharded(parts.functions, (*parts.trunk, *parts.heads))
        if self.gradient_balancer.sees == "jacobian":
            if measure is not None:
                raise ValueError(
                    "measure is for rules that give weights, but this one sees the Jacobian and gives a direction."
                )
            if self.source == "features" and not parts.features:
                raise ValueError(
                    "A rule that sees the Jacobian of the features needs every path from a loss to a shared parameter to go "
                    "through one of them, and none of them to be computed from another, but that is not so here."
                )
        return parts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask; the rules' state keeps its values and dtypes."""
        super()._apply(preserving(self, fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _check_choices(
    source: object, heads: object, scale: object, nan: object, zero: object, engine: object, memory: object
) -> None:
    check_type("source", source, Source)
    check_type("scale", scale, Scale)
    check_type("nan", nan, NanPolicy)
    check_type("zero", zero, ZeroPolicy)
    check_type("engine", engine, EngineChoice)
    check_type("memory", memory, Memory)
    if heads is not None:
        check_type("heads", heads, Heads)


def _check_jacobian_balancer(name: str, heads: Heads, scale: Scale, memory: Memory) -> None:
    if heads == "weighted" or scale == "sum":
        raise ValueError(
            f"'{name}' sees the Jacobian and has no weights, but got heads={heads!r}, scale={scale!r}. "
            'Use heads="unweighted" and scale="paper" or "norm".'
        )
    if memory == "gramian":
        raise ValueError(f"'{name}' sees the Jacobian, which memory='gramian' does not keep. Use memory='jacobian'.")


def _check_unused(shared: Iterable[Tensor] | None, features: Features | None, measure: Iterable[Tensor] | None) -> None:
    """Check arguments that only a gradient balancer uses, so that a gradient balancer added later raises no new error."""
    for name, parameters in (("shared", shared), ("measure", measure)):
        if parameters is not None:
            read_shared(parameters, name, measured=False)
    if features is not None:
        read_features(features)


def _description(gradient: str | GradientRule | None, options: Mapping[str, Any] | None) -> str:
    return "None" if gradient is None else describe(gradient, options)


def _refuse_several_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "Balancer balances the losses of one process, but torch.distributed runs "
            f"{torch.distributed.get_world_size()}: weights from local batches would be biased and differ between ranks."
        )
