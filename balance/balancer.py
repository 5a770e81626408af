"""Balancer: the one stage between the task losses and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.engine import Engine, Estimate
from balance.graph import leaves
from balance.inputs import NanPolicy, Step, read_features, read_losses, read_shared, task_names
from balance.jacobian import AtLosses, add, backward, change_rows
from balance.parts import Parts, read_parts
from balance.registry import check_type, gradient_balancers, loss_balancers, takes
from balance.report import Report
from balance.rules import apply_rule, build_chain, build_rule, try_out, warn_of_pairing
from balance.shapes import EngineChoice, GradientRule, Heads, LossRule, Memory, Scale, Sees, Source
from balance.weighing import weigh, weighing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from balance.shapes import Direction, Gramian, Jacobian, Weights


_ROUNDING = 1e-13  # of the squared length of a direction, relative to the largest that its terms could add up to


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
        loss_options: Mapping[str, Any] | None = None,
        gradient_options: Mapping[str, Any] | None = None,
        source: Source = "parameters",
        heads: Heads | None = None,
        scale: Scale = "paper",
        seed: int = 0,
        nan: NanPolicy = "error",
        engine: EngineChoice = "auto",
        memory: Memory = "jacobian",
    ) -> None:
        super().__init__()
        check_type("source", source, Source)
        check_type("scale", scale, Scale)
        check_type("nan", nan, NanPolicy)
        check_type("engine", engine, EngineChoice)
        check_type("memory", memory, Memory)
        if heads is not None:
            check_type("heads", heads, Heads)
        self.tasks = task_names(tasks)
        self.source, self.scale, self.nan = source, scale, nan
        if isinstance(loss, Sequence) and not isinstance(loss, str):
            self.loss: Any = build_chain(loss, loss_options, num_tasks=len(self.tasks), seed=2 * seed)
        else:
            self.loss = build_rule(loss_balancers, loss, loss_options, num_tasks=len(self.tasks), seed=2 * seed)
        self.gradient: Any = None
        self.sees: Sees = "gramian"
        self.heads: Heads = heads or getattr(gradient, "heads", None) or "unweighted"
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
        if self.sees == "jacobian" and (self.heads == "weighted" or scale == "sum"):
            raise ValueError(
                f"'{gradient}' sees the Jacobian and has no weights, but got heads={self.heads!r}, scale={scale!r}. "
                'Use heads="unweighted" and scale="paper" or "norm".'
            )
        if self.sees == "jacobian" and memory == "gramian":
            raise ValueError(f"'{gradient}' sees the Jacobian, which memory='gramian' does not hold. Use memory='jacobian'.")
        self.engine = Engine(engine, memory)
        warn_of_pairing(loss, gradient, len(self.tasks))
        # Mean losses of the epoch, for rules that think in epochs
        self.register_buffer("loss_sums", torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("loss_counts", torch.zeros(len(self.tasks), dtype=torch.int64))
        # What ``scale`` made of the last direction, for steps that use its weights again
        self.register_buffer("stretch", torch.ones((), dtype=torch.float64))
        self._skipped = False

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
    ) -> Report:
        """Balance the losses and add the result to ``.grad`` of every parameter, like ``losses.sum().backward()``.

        The graph is freed. Parameters that no task reaches keep ``.grad`` as it is, None included; frozen ones are
        no error. Without a gradient balancer this is one ordinary backward pass, whose gradients are not checked; with one,
        do not rely on hooks on ``.grad`` (``register_post_accumulate_grad_hook``): they fire only for what a weighted backward
        pass brings. Parameters of the balancer itself get the gradient of the plain sum of the weighted losses. Where no
        shared parameter requires a gradient there is nothing to balance, and all gradient weights are one.

        Args:
            losses: One scalar per task: a dict by name, from which tasks that are absent from this step are left out, or
                a tensor of shape (K,). From a dict, or what ``torch.stack`` made, each task's backward pass visits the
                graph of its own loss only.
            shared: Parameters that the tasks share. All others that the losses reach are task-specific heads. Needed with
                ``source="parameters"`` and a gradient balancer.
            features: The shared representation: one tensor, or several in sequences or dicts, of which a task may use some.
                With ``source="features"`` conflict is measured on them alone, also where a path from a loss to a shared
                parameter goes around them. With ``source="parameters"`` a hint: passes that all tasks can share begin there.
            measure: Measure conflict on these of the shared parameters alone (those of the last layers, say: the passes then
                stop there), and give the weights so found to the gradients of all shared parameters, in one backward pass.
                An approximation: ``report.gramian`` is that of these parameters.
            scaler: The GradScaler of mixed-precision training; give unscaled losses. The gradients are left scaled, for
                ``scaler.step``. A step with an infinite or NaN loss or gradient is left for it to skip.

        Returns:
            What was done.

        Raises:
            ValueError: If a loss has the wrong shape or name, a loss or gradient is not finite, or the losses do not
                reach what they should; ``.grad`` is then as before.
            TypeError: If a loss is not a tensor, or ``shared`` is not an iterable of parameters.
            RuntimeError: If several processes train together.
        """
        _refuse_several_processes()
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        step = read_losses(losses, self.tasks, self.nan)
        bad = step.not_finite()
        self._skipped = bool(bad)
        if bad and scaler is not None:
            return self._skip(step, scaler)
        if bad:
            raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
        if not step.losses.requires_grad:
            raise ValueError("No loss requires a gradient. Compute the losses with gradients enabled and do not detach them.")
        with torch.autocast(step.losses.device.type, enabled=False):  # the direction is no place for half precision
            if self.gradient is None:
                report = self._plain(step, scaler)
            else:
                report = self._balanced(step, self._parts(step, shared, features, measure), scaler)
        if not self._skipped:
            tasks = slice(None) if step.present is None else step.present
            self.loss_sums[tasks] += step.host.to(self.loss_sums)
            self.loss_counts[tasks] += 1
        return report

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
        step = read_losses(losses, self.tasks, self.nan)
        if bad := step.not_finite():
            raise ValueError(f"Losses must be finite, but got {bad}. Look at the data and the learning rate.")
        apply_rule(self.loss.observe, step, step.losses)

    def end_epoch(self) -> None:
        """Close an epoch: rules that think in epochs get its mean losses, NaN for a task that was never present."""
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

    def get_extra_state(self) -> dict[str, Any]:
        """The tasks, so that a checkpoint is not loaded into a stage for others."""
        return {"tasks": self.tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Check the tasks of a checkpoint.

        Raises:
            ValueError: If they differ from this stage's.
        """
        if tuple(state["tasks"]) != self.tasks:
            raise ValueError(f"The checkpoint is of tasks {tuple(state['tasks'])}, but this Balancer is for {self.tasks}.")

    def _plain(self, step: Step, scaler: GradScaler | None) -> Report:
        step.losses.retain_grad()  # the weights of the losses come with the backward pass
        weighted = weigh(self.loss, step, step.losses)
        total = weighted.sum()
        (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
        loss_weights = step.losses.grad
        if loss_weights is None:
            raise ValueError("The loss balancer must return losses that depend on the given ones, but they do not.")
        if scaler is not None:
            loss_weights = loss_weights / scaler.get_scale()
            if self.needs_observation:  # it must not learn from a step that the scaler will skip
                self._skipped = not all(p.grad is None or p.grad.isfinite().all() for p in leaves([step.losses]))
        weighted = weighted.detach()
        return Report(step.tasks, step.losses.detach(), weighted, loss_weights, torch.ones_like(weighted))

    def _parts(self, step: Step, shared: Any, features: Any, measure: Any) -> Parts:
        parts = read_parts(self.source, step.roots, shared, features, measure, self.parameters())
        if self.sees == "jacobian" and measure is not None:
            raise ValueError("measure is for rules that give weights, but this one sees the Jacobian and gives a direction.")
        if self.sees == "jacobian" and self.source == "features" and not parts.features:
            raise ValueError(
                "A rule that sees the Jacobian of the features needs every path from a loss to a shared parameter to go "
                "through one of them, and none of them to be computed from another, but that is not so here."
            )
        return parts

    def _balanced(self, step: Step, parts: Parts, scaler: GradScaler | None) -> Report:
        one = torch.ones_like(step.losses[0].detach())
        one, factor = (one, 1.0) if scaler is None else (scaler.scale(one), scaler.get_scale())
        start = AtLosses(step.roots, one)
        kept = self.gradient.reuse(step.present) if hasattr(self.gradient, "reuse") else None
        if kept is not None:
            return self._reused(step, start, parts, kept, factor)

        found = self.engine.measure(start, parts, whole=self.sees == "jacobian")
        if parts.inputs and not any(found.reached):
            raise ValueError(f"No loss reaches any of the {len(parts.inputs)} tensors in {self.source}.")
        numbers = torch.cat([found.gramian, found.heads.sums(found.gramian.device)[None]]).cpu()  # the one copy to the host
        G = numbers[:-1] / factor**2
        finite = (G.diagonal() + numbers[-1]).isfinite().tolist()
        bad = [task for task, is_finite in zip(step.tasks, finite, strict=True) if not is_finite]
        self._skipped = bool(bad)
        if bad and scaler is None:
            raise ValueError(f"Gradients must be finite, but those of {', '.join(bad)} are not. Look at the learning rate.")
        if bad and scaler is not None:
            return self._skip(step, scaler)

        weighed = weighing(self.loss, step)
        E = weighed.jacobian  # (K, K): gradients of the weighted losses = E @ gradients of the losses
        G = E @ G @ E.T  # (K, K)
        if found.jacobian is None or not parts.inputs:
            weights = self._weights(step, G) if parts.inputs else torch.ones_like(G[0])  # (K,)
            row_weights = weights @ E  # (K,), of the gradients of the losses
            found.accumulate(row_weights.tolist())
        else:
            weights, row_weights = None, E.sum(dim=0)
            change_rows(found.jacobian, E / factor)
            found.accumulate_direction(factor * self._direction(step, G, found.jacobian))  # (P,)
        found.heads.accumulate((row_weights if self.heads == "weighted" else E.sum(dim=0)).tolist())
        add(weighed.own, weighed.own_gradients, factor)
        return weighed.report(step, weights, G)

    def _reused(self, step: Step, start: AtLosses, parts: Parts, weights: Weights, factor: float) -> Report:
        """A step with weights that are known beforehand: one ordinary backward pass, and one through unweighted heads."""
        weighed = weighing(self.loss, step)
        total = float(weights.sum())
        weights = weights.cpu() * (len(weights) / total if self.scale == "sum" and total > 0 else self.stretch.cpu())
        row_weights = (weights @ weighed.jacobian).tolist()
        if self.heads == "weighted":
            backward(start, row_weights, [*parts.trunk, *parts.heads])
        else:
            backward(start, weighed.jacobian.sum(dim=0).tolist(), parts.heads, keep=True)
            backward(start, row_weights, parts.trunk)
        add(weighed.own, weighed.own_gradients, factor)
        return weighed.report(step, weights, None)

    def _skip(self, step: Step, scaler: GradScaler) -> Report:
        """Leave NaN gradients, so that the scaler skips the step; no rule sees it."""
        scaler.scale(step.losses.detach())  # it must know that it is in use
        for leaf in (*leaves(step.roots), *(parameter for parameter in self.parameters() if parameter.requires_grad)):
            add([leaf], [torch.full_like(leaf, math.nan)])
        losses = step.losses.detach()
        nothing = torch.full_like(losses, math.nan)
        return Report(step.tasks, losses, nothing, nothing, nothing)

    def _weights(self, step: Step, G: Gramian) -> Weights:
        """Weights of the gradients of the weighted losses. Shape (K,)."""
        weights = apply_rule(self.gradient, step, G, **self._keywords(step))
        if not isinstance(weights, torch.Tensor) or weights.shape != G.shape[:1] or not weights.isfinite().all():
            raise ValueError(f"The gradient balancer must return {len(G)} finite weights, but got {weights}.")
        weights = weights.detach().to(G)
        if self.scale == "sum":
            total = float(weights.sum())
            return weights * (len(G) / total if total > 0 else 1.0)
        rounding = float(weights.abs() @ G.diagonal().clamp(min=0).sqrt()) ** 2 * _ROUNDING
        self.stretch.fill_(self._stretch(G, float(weights @ G @ weights), rounding))
        return weights * self.stretch.cpu()

    def _direction(self, step: Step, G: Gramian, J: Jacobian) -> Direction:
        """The direction of a rule that sees the Jacobian. Shape (P,)."""
        direction = apply_rule(self.gradient, step, J, **self._keywords(step))
        if not isinstance(direction, torch.Tensor) or direction.shape != J.shape[1:] or not direction.isfinite().all():
            raise ValueError(f"The gradient balancer must return a finite direction ({J.shape[1]},), but got {direction}.")
        direction = direction.detach()
        square = float(torch.linalg.vector_norm(direction, dtype=torch.float64)) ** 2
        return direction * self._stretch(G, square, 0.0)

    def _keywords(self, step: Step) -> dict[str, Tensor]:
        return {"losses": step.host} if takes(self.gradient, "losses") else {}

    def _stretch(self, G: Gramian, square: float, rounding: float) -> float:
        """Factor that brings a direction of the given squared length to that of the summed gradient, if that is asked for."""
        if self.scale != "norm" or square <= rounding:  # a direction that is zero but for rounding stays so
            return 1.0
        return math.sqrt(max(float(G.sum()), 0.0) / square)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask; the rules' float64 state moves but is never cast."""

        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if tensor.dtype == torch.float64 else changed

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def _refuse_several_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "Balancer balances the losses of one process, but torch.distributed runs "
            f"{torch.distributed.get_world_size()}: weights from local batches would be biased and differ between ranks."
        )
