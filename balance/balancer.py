"""Balancer: the one stage between the task losses and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from balance.inputs import NanPolicy, Step, read_features, read_losses, read_shared, task_names
from balance.jacobian import (
    accumulate_direction,
    accumulate_heads,
    add,
    combined_gradients,
    gramian,
    leaves,
    loss_jacobian,
    task_gradients,
    through_features,
)
from balance.registry import check_type, gradient_balancers, loss_balancers, takes
from balance.report import Report
from balance.rules import apply_rule, build_chain, build_rule, try_out, warn_of_pairing
from balance.shapes import GradientRule, Heads, LossRule, Scale, Sees, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler

    from balance.shapes import Direction, Gramian, Jacobian, Losses, WeightedLosses, Weights


_ROUNDING = 1e-13  # of the squared length of a direction, relative to the largest that its terms could add up to


class _Parts(NamedTuple):
    """Leaves of the graph, and where conflict is measured."""

    inputs: list[Tensor]  # where conflict is measured: shared parameters, or features
    trunk: list[Tensor]  # parameters that get the direction
    heads: list[Tensor]  # the others


class _Weighing(NamedTuple):
    """What the loss balancer made of the losses, detached."""

    weighted: WeightedLosses
    jacobian: Tensor  # (K, K), of the weighted losses with respect to the losses
    own: list[Tensor]  # the loss balancer's parameters
    own_gradients: Sequence[Tensor | None]  # of the plain sum of the weighted losses

    def report(self, step: Step, weights: Weights | None, gramian: Gramian | None) -> Report:
        losses = step.losses.detach()
        loss_weights = self.jacobian.sum(dim=0).to(losses)
        return Report(step.tasks, losses, self.weighted, loss_weights, None if weights is None else weights.to(losses), gramian)


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
    ) -> None:
        super().__init__()
        check_type("source", source, Source)
        check_type("scale", scale, Scale)
        check_type("nan", nan, NanPolicy)
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
        features: Tensor | Sequence[Tensor] | None = None,
        scaler: GradScaler | None = None,
    ) -> Report:
        """Balance the losses and add the result to ``.grad`` of every parameter, like ``losses.sum().backward()``.

        The graph is freed. Parameters that no task reaches keep ``.grad`` as it is, None included; frozen ones are
        no error. Without a gradient balancer this is one ordinary backward pass, whose gradients are not checked; with one,
        hooks on ``.grad`` (``register_post_accumulate_grad_hook``) do not fire. Parameters of the balancer itself get the
        gradient of the plain sum of the weighted losses. Where no shared parameter requires a gradient there is nothing to
        balance, and all gradient weights are one.

        Args:
            losses: One scalar per task: a dict by name, from which tasks that are absent from this step are left out, or
                a tensor of shape (K,). A dict is better: each task's backward pass then visits its own graph only.
            shared: Parameters that the tasks share. All others that the losses reach are task-specific heads. Needed with
                ``source="parameters"`` and a gradient balancer.
            features: The shared representation, one tensor or several; with ``source="features"`` every path from a loss
                to a shared parameter must go through it. Not used with ``source="parameters"``.
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
            report = self._plain(step, scaler) if self.gradient is None else self._balanced(step, shared, features, scaler)
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
        weighted = self._weigh(step, step.losses)
        total = weighted.sum()
        (total if scaler is None else scaler.scale(total)).backward()  # type: ignore[no-untyped-call]
        loss_weights = step.losses.grad
        if loss_weights is None:
            raise ValueError("The loss balancer must return losses that depend on the given ones, but they do not.")
        if scaler is not None:
            loss_weights = loss_weights / scaler.get_scale()
            if self.needs_observation:  # it must not learn from a step that the scaler will skip
                self._skipped = not all(p.grad is None or p.grad.isfinite().all() for p in leaves(step.scalars))
        weighted = weighted.detach()
        return Report(step.tasks, step.losses.detach(), weighted, loss_weights, torch.ones_like(weighted))

    def _balanced(
        self,
        step: Step,
        shared: Iterable[Tensor] | None,
        features: Tensor | Sequence[Tensor] | None,
        scaler: GradScaler | None,
    ) -> Report:
        factor = 1.0 if scaler is None else scaler.get_scale()
        scalars = step.scalars if scaler is None else [scaler.scale(scalar) for scalar in step.scalars]
        parts = self._parts(scalars, shared, features)
        kept = self.gradient.reuse(step.present) if hasattr(self.gradient, "reuse") else None
        if kept is not None:
            return self._reused(step, scalars, parts, kept, factor)

        rows = task_gradients(scalars, parts.inputs, parts.heads, keep=scaler is not None or self.source == "features")
        if parts.inputs and not any(rows.reached):
            raise ValueError(f"No loss reaches any of the {len(parts.inputs)} tensors in {self.source}.")
        J = rows.jacobian.div_(factor)  # (K, P)
        G, squares = torch.split(torch.cat([gramian(J), rows.head_squares[None]]).cpu(), len(J))  # one copy to the host
        bad = [t for t, own, head in zip(step.tasks, G.diagonal(), squares[0], strict=True) if not (own + head).isfinite()]
        self._skipped = bool(bad)
        if bad and scaler is None:
            raise ValueError(f"Gradients must be finite, but those of {', '.join(bad)} are not. Look at the learning rate.")
        if bad and scaler is not None:
            return self._skip(step, scaler)

        weighing = self._weighing(step)
        E = weighing.jacobian  # (K, K): gradients of the weighted losses = E @ gradients of the losses
        G = E @ G @ E.T  # (K, K)
        weights, direction = self._combine(step, G, E, J)  # (K,), (P,)
        row_weights = (torch.ones_like(E[0]) if weights is None else weights) @ E  # (K,), of the gradients of the losses
        if self.source == "parameters":
            direction = factor * (row_weights.to(J) @ J if direction is None else direction)
            accumulate_direction(direction, parts.inputs, rows.reached)
        elif direction is None:
            add(parts.trunk, combined_gradients(scalars, parts.trunk, row_weights, keep=False))
        else:
            add(parts.trunk, through_features(factor * direction, parts.inputs, rows.reached, parts.trunk))
        accumulate_heads(rows, row_weights if self.heads == "weighted" else E.sum(dim=0))
        add(weighing.own, weighing.own_gradients, factor)
        return weighing.report(step, weights, G)

    def _reused(self, step: Step, scalars: Sequence[Tensor], parts: _Parts, weights: Weights, factor: float) -> Report:
        """A step with weights that are known beforehand: one ordinary backward pass, and one through unweighted heads."""
        weighing = self._weighing(step)
        total = float(weights.sum())
        weights = weights.cpu() * (len(weights) / total if self.scale == "sum" and total > 0 else self.stretch.cpu())
        row_weights = weights @ weighing.jacobian
        if self.heads == "weighted":
            everything = [*parts.trunk, *parts.heads]
            add(everything, combined_gradients(scalars, everything, row_weights, keep=False))
        else:
            below = combined_gradients(scalars, parts.trunk, row_weights, keep=True)
            add(parts.heads, combined_gradients(scalars, parts.heads, weighing.jacobian.sum(dim=0), keep=False))
            add(parts.trunk, below)
        add(weighing.own, weighing.own_gradients, factor)
        return weighing.report(step, weights, None)

    def _weighing(self, step: Step) -> _Weighing:
        losses = step.losses.detach().requires_grad_()
        weighted = self._weigh(step, losses)
        own = [tensor for tensor in leaves([weighted.sum()]) if tensor is not losses]
        gradients = torch.autograd.grad(weighted.sum(), own, retain_graph=True, allow_unused=True) if own else ()
        return _Weighing(weighted.detach(), loss_jacobian(weighted, losses).cpu(), own, gradients)

    def _parts(
        self, scalars: Sequence[Tensor], shared: Iterable[Tensor] | None, features: Tensor | Sequence[Tensor] | None
    ) -> _Parts:
        if self.source == "parameters":
            inputs = trunk = read_shared(shared)
        else:
            inputs = read_features(features)
            trunk = leaves(inputs)
            if shared is not None:
                trunk = list({id(tensor): tensor for tensor in (*trunk, *read_shared(shared))}.values())
        excluded = {id(tensor) for tensor in (*trunk, *self.parameters())}
        return _Parts(inputs, trunk, [leaf for leaf in leaves(scalars) if id(leaf) not in excluded])

    def _skip(self, step: Step, scaler: GradScaler) -> Report:
        """Leave NaN gradients, so that the scaler skips the step; no rule sees it."""
        scaler.scale(step.losses.sum() * math.nan).backward()  # type: ignore[no-untyped-call]
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        add(own, [torch.full_like(parameter, math.nan) for parameter in own])
        losses = step.losses.detach()
        nothing = torch.full_like(losses, math.nan)
        return Report(step.tasks, losses, nothing, nothing, nothing)

    def _weigh(self, step: Step, losses: Losses) -> WeightedLosses:
        with torch.enable_grad():
            weighted = apply_rule(self.loss, step, losses)
        if not isinstance(weighted, torch.Tensor) or weighted.shape != losses.shape:
            found = tuple(weighted.shape) if isinstance(weighted, torch.Tensor) else type(weighted).__name__
            raise ValueError(f"The loss balancer must return shape {tuple(losses.shape)}, one value per task, but got {found}.")
        if not weighted.requires_grad:
            raise ValueError("The loss balancer must return losses that depend on the given ones, but they are detached.")
        if not weighted.isfinite().all():
            raise ValueError(f"The loss balancer made {weighted.tolist()} of the losses {losses.tolist()} of {step.tasks}.")
        return weighted

    def _combine(self, step: Step, G: Gramian, E: Tensor, J: Jacobian) -> tuple[Weights | None, Direction | None]:
        """Weights of the gradients of the weighted losses, or the direction where the rule sees the Jacobian."""
        if J.shape[1] == 0:
            return torch.ones_like(G[0]), None
        keywords = {"losses": step.host} if takes(self.gradient, "losses") else {}
        if self.sees == "jacobian":
            direction = apply_rule(self.gradient, step, E.to(J) @ J, **keywords)
            if not isinstance(direction, torch.Tensor) or direction.shape != J.shape[1:] or not direction.isfinite().all():
                raise ValueError(f"The gradient balancer must return a finite direction ({J.shape[1]},), but got {direction}.")
            direction = direction.detach()
            return None, direction * self._stretch(G, float(direction.double().square().sum()), 0.0)
        weights = apply_rule(self.gradient, step, G, **keywords)
        if not isinstance(weights, torch.Tensor) or weights.shape != G.shape[:1] or not weights.isfinite().all():
            raise ValueError(f"The gradient balancer must return {len(G)} finite weights, but got {weights}.")
        weights = weights.detach().to(G)
        if self.scale == "sum":
            total = float(weights.sum())
            return weights * (len(G) / total if total > 0 else 1.0), None
        rounding = float(weights.abs() @ G.diagonal().clamp(min=0).sqrt()) ** 2 * _ROUNDING
        self.stretch.fill_(self._stretch(G, float(weights @ G @ weights), rounding))
        return weights * self.stretch.cpu(), None

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
