"""Balancer: the one stage between the task losses and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from balance.engine.accumulate import accumulate, are_finite, as_leaf, nan_gradients
from balance.engine.custom_functions import refuse_sharded
from balance.engine.engine import Engine, Estimate
from balance.engine.gramian import HeadGradients
from balance.engine.graph import leaves
from balance.engine.partition import Parts, read_features, read_parts, read_shared
from balance.engine.passes import AtLosses, one_by_one
from balance.messages import warn_caller
from balance.rules.build import apply_rule, build_chain, build_rule, describe, try_out, warn_of_pairing
from balance.rules.casting import preserving
from balance.rules.registry import check_type, gradient_balancers, loss_balancers
from balance.rules.snapshot import Snapshot
from balance.rules.task_names import check_tasks, encode_tasks
from balance.stage.arguments import NanPolicy, Step, ZeroPolicy, check_factor, read_losses, task_names
from balance.stage.loss_weighting import weigh, weighing
from balance.stage.report import Report
from balance.stage.step import BalancedStep, NotFiniteError
from balance.types import EngineChoice, GradientRule, Heads, LossRule, Memory, Scale, Sees, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

_SILENT_STEPS = {"observation": 50, "epochs": 200}  # steps after which a missing call is probably forgotten


class _Left(NamedTuple):
    """A parameter of the balancer as a step left it."""

    gradient: int  # id of its ``.grad``
    version: int
    value: Tensor
    skipped: bool  # whether the scaler was to skip the step


class Balancer(nn.Module):
    """A loss balancer and a gradient balancer, composed, in place of ``losses.sum().backward()``.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...).
        loss: Name of a registered loss balancer, or several, which are applied from left to right, or any differentiable
            callable (K,) -> (K,).
        gradient: Name of a registered gradient balancer, or any callable from a Gramian (K, K) to weights (K,), or None: one
            ordinary backward of the sum of the weighted losses.
        loss_options: Options of a registered loss balancer; of several, options by name.
        gradient_options: Options of a registered gradient balancer.
        source: Where conflict is measured: gradients with respect to the shared ``"parameters"``, or to the
            ``"features"`` that they compute (every sample counts on its own; one backward pass through the trunk instead of K).
        heads: Task-specific parameters get the gradients of the weighted losses as they are (``"unweighted"``) or times
            the gradient balancer's weights (``"weighted"``); None: as in the paper code of the gradient balancer.
        scale: Length of the direction: as the ``"paper"`` defines it; weights rescaled to ``"sum"`` to K; or the
            ``"norm"`` of the summed gradient of the weighted losses, so that the learning rate keeps its meaning.
        seed: Seed of the rules that draw; the two rules draw different numbers.
        nan: What a loss of NaN is: an ``"error"``, or a sign that the task is ``"absent"`` from the step.
        zero: What a loss of exactly zero is: an ordinary loss of a task that is ``"present"``, or a sign that the task is
            ``"absent"`` from the step, since it has no labels in this batch. With ``"absent"`` the gradient balancer also
            leaves out a task whose gradient of all shared parameters is exactly zero.
        engine: How the K backward passes run: one after the other (``"loop"``); all in one batch (``"batched"``), which
            holds K gradients of the activations on its way, wants ``features`` at every step, so that only the trunk is
            in it, and goes back to the loop with a warning where an operation cannot be batched; or ``"auto"``: batched on
            an accelerator, if ``features`` are given and the trunk has more parameters than activations, else the loop.
        memory: What is held of the gradients with respect to the shared parameters. ``"jacobian"``: all of them, at most K
            times as many numbers as there are shared parameters; for a linear or convolutional layer whose batch is
            smaller than its weight only the gradients of its outputs, which say the same. ``"gramian"``: at most 0.4
            times that, or the largest parameter's; the passes are repeated, each time down to another part of the parameters,
            and a weighted backward pass follows.

    Raises:
        ValueError: If a name, an option or a choice is unknown, or the task names are not distinct.
        TypeError: If an option has the wrong type.

    The stage is an ``nn.Module``: its ``parameters()`` belong in the optimizer and its ``state_dict()`` in the checkpoint.
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
        check_type("source", source, Source)
        check_type("scale", scale, Scale)
        check_type("nan", nan, NanPolicy)
        check_type("zero", zero, ZeroPolicy)
        check_type("engine", engine, EngineChoice)
        check_type("memory", memory, Memory)
        if heads is not None:
            check_type("heads", heads, Heads)
        self.tasks = task_names(tasks)
        self.source, self.scale, self.nan, self.zero = source, scale, nan, zero
        self._described = describe(loss, loss_options), "None" if gradient is None else describe(gradient, gradient_options)
        if isinstance(loss, Sequence) and not isinstance(loss, str):
            self.loss: Any = build_chain(loss, loss_options, num_tasks=len(self.tasks), seed=2 * seed)
        else:
            self.loss = build_rule(loss_balancers, loss, loss_options, num_tasks=len(self.tasks), seed=2 * seed)
        self.gradient: Any = None
        self.sees: Sees = "gramian"
        self.heads: Heads = heads or getattr(gradient, "heads", None) or "unweighted"
        self.fixed_length: bool = getattr(gradient, "fixed_length", False)
        if gradient is not None:
            self.gradient = build_rule(
                gradient_balancers, gradient, gradient_options, num_tasks=len(self.tasks), seed=2 * seed + 1
            )
        elif gradient_options:
            raise ValueError(f"gradient_options need a gradient balancer, but got {dict(gradient_options)} and gradient=None.")
        if isinstance(gradient, str):
            self.sees = gradient_balancers.sees(gradient)
            if self.sees == "gramian" and gradient_options and not isinstance(self.gradient, nn.Module):
                try_out(self.gradient, len(self.tasks))
            self.heads = heads or gradient_balancers.heads(gradient)
            self.fixed_length = gradient_balancers.method(gradient).traits.ignores_weights
        if self.sees == "jacobian" and (self.heads == "weighted" or scale == "sum"):
            raise ValueError(
                f"'{gradient}' sees the Jacobian and has no weights, but got heads={self.heads!r}, scale={scale!r}. "
                'Use heads="unweighted" and scale="paper" or "norm".'
            )
        if self.sees == "jacobian" and memory == "gramian":
            raise ValueError(f"'{gradient}' sees the Jacobian, which memory='gramian' does not hold. Use memory='jacobian'.")
        self.engine = Engine(engine, memory)
        warn_of_pairing(loss, gradient, len(self.tasks))
        # Sums of the losses of the epoch, for rules that update once per epoch
        self.register_buffer("loss_sums", torch.zeros(len(self.tasks), dtype=torch.float64, device="cpu"))
        self.register_buffer("loss_counts", torch.zeros(len(self.tasks), dtype=torch.int64, device="cpu"))
        # Factor of ``scale`` on the last direction, for steps that use its weights again
        self.register_buffer("stretch", torch.ones((), dtype=torch.float64, device="cpu"))
        self._skipped = False
        self._silent_steps = {"observation": 0, "epochs": 0}  # -1: called, or warned of
        self._warned_of_lonely_parameters = False
        self._left: dict[int, _Left] = {}  # own parameters as the last step left them, by id

    @property
    def needs_observation(self) -> bool:
        """Whether `observe` must be called after each optimizer step."""
        return hasattr(self.loss, "observe") and getattr(self.loss, "needs_observation", True)

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

        The graph is freed. Parameters that no task reaches keep ``.grad`` as it is, None included; frozen ones are
        no error. Without a gradient balancer this is one ordinary backward pass, whose gradients are not checked. A hook on a
        tensor inside the graph acts once in the backward pass of each task. A hook on a parameter, or on its ``.grad``, acts
        once, on the final gradient. Parameters of the balancer itself get the gradient of the plain sum of the weighted losses;
        once an optimizer has used it, the next step begins anew, also if nobody has set it to zero. Where no shared parameter
        requires a gradient there is nothing to balance, and all gradient weights are one. If a step fails, ``.grad`` and the
        state of all rules are as before.

        A gradient balancer walks the graph once for each task. Where that is impossible (reentrant checkpoints, functions that
        add to ``.grad`` themselves, compiled functions with donated buffers) an error says so, and what works instead. At
        the first step a graph with custom or compiled functions is walked twice more, to see whether the gradients repeat.

        Args:
            losses: One scalar per task: a dict by name, from which tasks that are absent from this step are left out, or
                a tensor of shape (K,). From a dict, or what ``torch.stack`` made, each task's backward pass visits the
                graph of its own loss only.
            shared: Parameters that the tasks share. All others that the losses reach are task-specific heads. Needed with
                ``source="parameters"`` and a gradient balancer. A task that reaches none of them takes no part in the
                gradient balancer; its head is trained with weight one, and ``report.unshared`` names it.
            features: The shared representation: one tensor, or several in sequences or dicts, of which a task may use some.
                With ``source="features"`` conflict is measured on them alone, also where a path from a loss to a shared
                parameter goes around them. With ``source="parameters"`` a hint: passes that all tasks can share begin there.
            measure: Measure conflict on these of the shared parameters alone (those of the last layers, say: the passes then
                stop there), and give the weights so found to the gradients of all shared parameters, in one backward pass.
                An approximation: ``report.gramian`` is that of these parameters. A rule that fixes the length of its direction
                (nashmtl), and ``scale="norm"``, get that length for all shared parameters, by one or two further passes.
            scaler: The GradScaler of mixed-precision training; give unscaled losses. The gradients are left scaled, for
                ``scaler.step``. A step with an infinite or NaN loss or gradient is left for it to skip.
            factor: Factor on everything that is added to ``.grad``, positive; for accumulation over n micro-batches 1 / n. The
                rules see the losses without it.

        Returns:
            The record of the step.

        Raises:
            ValueError: If a loss has the wrong shape or name, a loss or gradient is not finite, or the losses do not
                reach what they should; ``.grad`` is then as before.
            TypeError: If a loss is not a tensor, or ``shared`` is not an iterable of parameters.
            RuntimeError: If several processes train together, or the graph cannot be walked once for each task.
        """
        return self._step(losses, shared, features, measure, scaler, factor)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # to trace the stage takes long and fails
    @torch.enable_grad()  # as loss.backward(), which works inside no_grad() too
    def _step(self, losses: Any, shared: Any, features: Any, measure: Any, scaler: GradScaler | None, factor: float) -> Report:
        _refuse_several_processes()
        check_factor(factor)
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        step = read_losses(losses, self.tasks, self.nan, self.zero)
        own = list(self.parameters())
        parts = self._parts(step, shared, features, measure, own)
        bad = step.not_finite()
        self._skipped = bool(bad)
        if bad and scaler is not None:
            return self._skip(step, scaler)
        if bad:
            raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
        if not step.losses.requires_grad:
            raise ValueError("No loss requires a gradient. Compute the losses with gradients enabled and do not detach them.")
        before = Snapshot(self.loss, self.gradient), self.stretch.clone(), self._drop_consumed(own)
        try:
            with torch.autocast(step.losses.device.type, enabled=False):  # the direction is no place for half precision
                report = self._taken(step, parts, scaler, factor)
        except BaseException as error:
            self._put_back(*before)
            if scaler is None or not isinstance(error, NotFiniteError):
                raise
            return self._skip(step, scaler)
        if self._skipped:  # the scaler will skip what an ordinary backward pass has left
            before[0].restore()
        else:
            tasks = slice(None) if step.present is None else step.present
            self.loss_sums[tasks] += step.host.to(self.loss_sums)
            self.loss_counts[tasks] += 1
            self._warn_of_silence()
        self._remember(own)
        return report

    def _taken(self, step: Step, parts: Parts | None, scaler: GradScaler | None, factor: float) -> Report:
        if parts is None:
            return self._plain(step, scaler, factor)
        one, scale = _seed(step, scaler)
        return BalancedStep(self, step, parts, one, scale, factor).run()

    @torch.no_grad()
    def observe(self, losses: Mapping[str, Tensor] | Tensor) -> None:
        """Show the losses of the same batch after the optimizer's step to a rule that learns from them (famo).

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
        apply_rule(self.loss.observe, step, step.losses)
        self._silent_steps["observation"] = -1

    def end_epoch(self) -> None:
        """Close an epoch: rules that update once per epoch get its mean losses, NaN for a task that was never present."""
        self._silent_steps["epochs"] = -1
        if hasattr(self.loss, "end_epoch"):
            self.loss.end_epoch(self.loss_sums / self.loss_counts)
        self.loss_sums.zero_()
        self.loss_counts.zero_()

    def estimate(
        self, shared: Iterable[Tensor] | None = None, *, features: Any = None, measure: Iterable[Tensor] | None = None
    ) -> Estimate:
        """Memory that a step will need beyond that of ``losses.sum().backward()``, before any step is made.

        Args:
            shared: As for `backward`.
            features: With ``source="features"``: the features, or tensors of their shapes and types.
            measure: As for `backward`.

        Raises:
            ValueError, TypeError: As `backward`.
        """
        if self.gradient is None:
            return Estimate(0, 0, 0)
        if self.source == "features":
            inputs = trunk = read_features(features, computed=False)
        else:
            trunk = read_shared(shared)
            inputs = trunk if measure is None else read_shared(measure, "measure")
        return self.engine.estimate(inputs, trunk, len(self.tasks), blocks=self.source == "parameters")

    def get_extra_state(self) -> Tensor:
        """Return the names of the tasks, so that a checkpoint is not loaded into a stage for others. Shape (n,), uint8."""
        return encode_tasks(self.tasks)

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from this stage's.
        """
        check_tasks(state, self.tasks, "Balancer")

    def __repr__(self) -> str:
        loss, gradient = self._described
        choices = {"source": "parameters", "scale": "paper", "nan": "error", "zero": "present"}
        chosen = [f"{name}={getattr(self, name)!r}" for name, default in choices.items() if getattr(self, name) != default]
        ways = {"engine": (self.engine.choice, "auto"), "memory": (self.engine.memory, "jacobian")}
        chosen += [f"{name}={value!r}" for name, (value, default) in ways.items() if value != default]
        return f"Balancer({', '.join([repr(self.tasks), f'loss={loss}', f'gradient={gradient}', *chosen])})"

    def warn_of_lonely_parameters(self, step: Step, parts: Parts, reaches: Sequence[Sequence[bool]]) -> None:
        """Warn once of shared parameters that one task alone reaches: they are probably a head."""
        if self._warned_of_lonely_parameters or self.source != "parameters" or sum(map(any, zip(*reaches, strict=True))) < 2:
            return
        lonely = [i for i, tasks in enumerate(reaches) if sum(tasks) == 1]
        if lonely:
            self._warned_of_lonely_parameters = True
            first = lonely[0]
            task, shape = step.tasks[list(reaches[first]).index(True)], tuple(parts.inputs[first].shape)
            warn_caller(
                f"shared must hold parameters that several tasks reach, but a parameter of shape {shape} is reached by "
                f"task '{task}' only ({len(lonely)} such in all). If it belongs to a head, leave it out of shared."
            )

    def _plain(self, step: Step, scaler: GradScaler | None, factor: float) -> Report:
        if step.is_half:
            return self._plain_in_half_precision(step, scaler, factor)
        step.losses.retain_grad()  # the weights of the losses come with the backward pass
        weighted = weigh(self.loss, step, step.losses)
        total = weighted.sum() if factor == 1.0 else factor * weighted.sum()
        (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
        loss_weights = step.losses.grad
        if loss_weights is None:
            raise ValueError("The loss balancer must return losses that depend on the given ones, but they do not.")
        loss_weights = loss_weights / (factor * (1.0 if scaler is None else scaler.get_scale()))
        if scaler is not None and (self.needs_observation or isinstance(self.loss, nn.Module)):
            gradients = [leaf.grad for leaf in leaves([step.losses]) if leaf.grad is not None]
            self._skipped = not are_finite(gradients)  # no rule must learn from a step that the scaler will skip
        weighted = weighted.detach()
        return Report(step.tasks, step.losses.detach(), weighted, loss_weights, torch.ones_like(weighted))

    def _plain_in_half_precision(self, step: Step, scaler: GradScaler | None, factor: float) -> Report:
        """Take the step with one backward pass for each task: the weight of a small loss overflows as a seed of a pass."""
        weighed = weighing(self.loss, step)
        one, scale = _seed(step, scaler)
        trained = [leaf for leaf in leaves(step.roots) if leaf.requires_grad]
        found = HeadGradients([])
        for gradients in one_by_one(AtLosses(step.roots, one), trained, keep=False):
            found.append(trained, gradients)
        pairs = [*found.weighted((factor * weighed.jacobian.sum(dim=0)).tolist()), *weighed.own_pairs(factor * scale)]
        self._skipped = scaler is not None and not are_finite([as_leaf(gradient, leaf) for leaf, gradient in pairs])
        accumulate(pairs)
        return weighed.report(step, torch.ones(len(step.tasks), dtype=torch.float64, device="cpu"), None)

    def _parts(self, step: Step, shared: Any, features: Any, measure: Any, own: Sequence[Tensor]) -> Parts | None:
        if self.gradient is None:  # arguments that are given are checked, so that a gradient balancer is no surprise later
            for name, given in (("shared", shared), ("measure", measure)):
                if given is not None:
                    read_shared(given, name, measured=False)
            if features is not None:
                read_features(features)
            return None
        parts = read_parts(self.source, step.roots, shared, features, measure, own)
        refuse_sharded((*parts.above.functions, *parts.below.functions), (*parts.trunk, *parts.heads))
        if self.sees == "jacobian" and measure is not None:
            raise ValueError("measure is for rules that give weights, but this one sees the Jacobian and gives a direction.")
        if self.sees == "jacobian" and self.source == "features" and not parts.features:
            raise ValueError(
                "A rule that sees the Jacobian of the features needs every path from a loss to a shared parameter to go "
                "through one of them, and none of them to be computed from another, but that is not so here."
            )
        return parts

    def _skip(self, step: Step, scaler: GradScaler) -> Report:
        """Leave NaN gradients, so that the scaler skips the step; no rule sees it."""
        self._skipped = True
        scaler.scale(step.losses.detach())  # initialises the scaler, which scaler.step requires
        own = list(self.parameters())
        accumulate(nan_gradients([*leaves(step.roots), *(p for p in own if p.requires_grad)]))
        self._remember(own)
        losses = step.losses.detach()
        nothing = torch.full_like(losses, torch.nan)
        return Report(step.tasks, losses, nothing, nothing, nothing)

    def _drop_consumed(self, own: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Drop gradients of own parameters that an optimizer has used, or that belong to a skipped step.

        Not every training loop sets them to zero: it may know the model's parameters only.

        Returns:
            The parameters and their ``.grad`` before.
        """
        before = [(parameter, parameter.grad) for parameter in own]
        for parameter, gradient in before:
            left = self._left.get(id(parameter))
            if gradient is None or left is None or left.gradient != id(gradient):
                continue
            # Fused optimizers do not count as a new version, so the values decide
            if left.skipped or left.version != parameter._version or not torch.equal(left.value, parameter):
                parameter.grad = None
        return before

    def _remember(self, own: Sequence[Tensor]) -> None:
        """Remember the own parameters as this step left them, to see later whether an optimizer has used the gradients."""
        self._left = {id(p): _Left(id(p.grad), p._version, p.detach().clone(), self._skipped) for p in own if p.requires_grad}

    def _put_back(self, rules: Snapshot, stretch: Tensor, own: list[tuple[Tensor, Tensor | None]]) -> None:
        rules.restore()
        self.stretch.copy_(stretch)
        for parameter, gradient in own:
            parameter.grad = gradient

    def _warn_of_silence(self) -> None:
        """Warn once of a call that a loss balancer needs and that never comes."""
        calls = {
            "observation": (self.needs_observation, "observe(losses) after each optimizer step"),
            "epochs": (getattr(self.loss, "needs_epochs", False), "end_epoch() after each epoch"),
        }
        for kind, (needed, call) in calls.items():
            if not needed or self._silent_steps[kind] < 0:
                continue
            self._silent_steps[kind] += 1
            if self._silent_steps[kind] == _SILENT_STEPS[kind]:
                self._silent_steps[kind] = -1
                warn_caller(
                    f"The loss balancer {self._described[0]} needs balancer.{call}, but {_SILENT_STEPS[kind]} steps have "
                    "passed without: its weights stay as they are. Ignore this if the call is still to come."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask; the rules' state keeps its values and dtypes."""
        super()._apply(preserving(self, fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _seed(step: Step, scaler: GradScaler | None) -> tuple[Tensor, float]:
    """Return the gradient with which backward passes begin, as a tensor and as a number."""
    one = torch.ones_like(step.losses[0].detach())
    return (one, 1.0) if scaler is None else (scaler.scale(one), scaler.get_scale())


def _refuse_several_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "Balancer balances the losses of one process, but torch.distributed runs "
            f"{torch.distributed.get_world_size()}: weights from local batches would be biased and differ between ranks."
        )
