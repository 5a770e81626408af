"""The Balancer, the one stage between the task losses and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..distributed.ranks import Ranks
from ..engine.engine import Engine, Estimate
from ..engine.metric import OptimizerMetric
from ..engine.partition import read_features, read_shared
from ..rules.build import build_gradient_balancer, build_loss_balancer, check_source, warn_of_pairing
from ..rules.casting import preserving
from ..rules.options import describe
from ..rules.priorities import read_priorities
from ..types import EngineChoice, GradientRule, Heads, LossRule, Memory, Scale, Source
from .arguments import Counts, NanPolicy, StepArguments, ZeroPolicy, listed, task_names
from .choices import Checks, check_choices, check_jacobian_balancer, check_metric
from .collection import Collection, collecting
from .deferred import deferred_loss
from .execution import execute, prepare
from .learning import LearningStage
from .methods import methods_of
from .own_gradients import OwnGradients
from .reminders import Reminders
from .samples import check_sample_choices, check_sample_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from .plain_step import Outcome
    from .report import Report

    Features = Tensor | Sequence[Any] | Mapping[str, Any]

_DEFAULTS = {"source": "parameters", "scale": "paper", "nan": "error", "zero": "present", "checks": "auto"}


class Balancer(LearningStage):
    r"""A loss balancer and a gradient balancer, composed, in place of ``losses.sum().backward()``.

    The stage is an ``nn.Module``: its ``parameters()`` belong in the optimizer and its ``state_dict()`` in the checkpoint.

    Args:
        tasks: Names of the tasks, or their number K (the names are then "0", "1", ...). None: one loss per sample, in a tensor
            of shape (B,) with any B at each step; only rules without state by task.
        loss: Name of a registered loss balancer, or several names, which are applied from left to right, or any
            differentiable callable (K,) -> (K,).
        gradient: Name of a registered gradient balancer, or any callable from a Gramian (K, K) to weights (K,). None: one
            ordinary backward pass of the sum of the weighted losses.
        loss_options: Options of a registered loss balancer; of several, options by name.
        gradient_options: Options of a registered gradient balancer.
        weights: Priorities of the tasks, 1 for tasks that are left out: factors on the losses under any pair of rules. They
            multiply what the loss balancer returns, so that no loss balancer can remove them as a difference of scale. A
            gradient balancer registered as a remedy for ``"gradient length"`` would remove them too. It sees the gradients
            without the priorities, and its weights apply to the gradients with them.
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
            the trunk has more parameters than activations, and on a CPU with 8 tasks or more and small operations. Without
            ``features`` it is the loop. Tensors inside of a batched trunk cannot retain gradients.
        memory: Gradients of the shared parameters that are kept. ``"jacobian"``: all of them, at most K times as many numbers
            as shared parameters. For a linear or convolutional layer whose batch is smaller than its weight, only the
            gradients of its outputs are kept, which suffice. ``"gramian"``: at most 0.4 times as many numbers, or the gradients
            of the largest parameter. The passes are repeated for parts of the parameters, and a weighted backward pass follows.
        metric: The optimizer of the shared parameters: conflict and length are then measured as its steps change the losses,
            to first order. The Gramian is :math:`J P^{-1} J^\top` with the optimizer's current diagonal P, of Adam, AdamW,
            RMSprop or Adagrad; SGD has the identity. The direction is a combination of the gradients themselves. Lengths of
            directions are lengths in this metric. Can be set later, as ``balancer.metric = optimizer``.
        process_group: The data-parallel processes that train together; None: all processes of torch.distributed.
        checks: Time at which values of losses that are not finite or out of a rule's domain are errors. ``"auto"``: at once on
            the host. On an accelerator a step with ``gradient=None`` does not wait for the device. Its error is raised by the
            next call, or by `check`; its gradients are zero, and no rule learns from it. ``"now"``: always at once. A step
            also waits with a gradient balancer, ``"absent"`` losses, several processes or losses of half precision. It waits
            with a GradScaler if the rule has state. So do rules of your own, igbv2, famo(optimizer="user"), groupings other
            than k-means, and learned scales on another device or with absent tasks. Call ``balancer.to(device)``.

    Raises:
        ValueError: If a name, an option or a choice is unknown, or the task names are not distinct.
        TypeError: If an option has the wrong type.
    """

    stretch: Tensor

    def __init__(
        self,
        tasks: Sequence[str] | int | None,
        loss: str | Sequence[str] | LossRule = "ls",
        gradient: str | GradientRule | None = None,
        *,
        loss_options: Mapping[str, Any] | None = None,
        gradient_options: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        source: Source = "parameters",
        heads: Heads | None = None,
        scale: Scale = "paper",
        seed: int = 0,
        nan: NanPolicy = "error",
        zero: ZeroPolicy = "present",
        engine: EngineChoice = "auto",
        memory: Memory = "jacobian",
        metric: Optimizer | None = None,
        process_group: ProcessGroup | None = None,
        checks: Checks = "auto",
    ) -> None:
        check_choices(source, heads, scale, nan, zero, engine, memory, checks)
        super().__init__(() if tasks is None else task_names(tasks), nan, zero, Ranks(process_group, is_shared=True), checks)
        self.source, self.scale = source, scale
        self.methods = methods_of(loss, loss_options, gradient, gradient_options)
        self._descriptions = describe(loss, loss_options), describe(gradient, gradient_options)
        K = len(self.tasks) or 2  # rules without state by task ignore it
        if tasks is None:
            check_sample_rules(loss, gradient, weights)
        self.priorities = read_priorities(weights, self.tasks)
        self.loss_balancer = build_loss_balancer(loss, loss_options, K, 2 * seed, self.priorities)
        self.gradient_balancer = None
        if gradient is not None:
            self.gradient_balancer = build_gradient_balancer(gradient, gradient_options, K, 2 * seed + 1, self.priorities)
        elif gradient_options:
            raise ValueError(f"gradient_options need a gradient balancer, but got {dict(gradient_options)} and gradient=None.")
        self._heads = heads
        if self.gradient_balancer is not None and self.gradient_balancer.sees == "jacobian":
            check_jacobian_balancer(self._descriptions[1], self.heads, scale, memory)
        if tasks is None:
            check_sample_choices(self.loss_balancer, nan, self.ranks)
        check_source(gradient, features=source == "features")
        self.engine = Engine(engine, memory)
        self.metric = metric
        self.reminders = Reminders(self._descriptions[0])
        warn_of_pairing(loss, gradient, K)
        # Factor of ``scale`` on the last direction, for steps that reuse its weights
        self.register_buffer("stretch", torch.ones((), dtype=torch.float64, device="cpu"))
        self.own_gradients = OwnGradients()
        self.collection: Collection | None = None

    @property
    def metric(self) -> OptimizerMetric | None:
        """Metric of an optimizer for the inner products of gradients, or None for the usual inner products."""
        return self._metric

    @metric.setter
    def metric(self, optimizer: Optimizer | None) -> None:
        if optimizer is not None:
            check_metric(self.source, self.gradient_balancer)
        self._metric = None if optimizer is None else OptimizerMetric(optimizer)

    @property
    def heads(self) -> Heads:
        """Treatment of task-specific parameters, as chosen or as in the paper code of the gradient balancer."""
        return self._heads or ("unweighted" if self.gradient_balancer is None else self.gradient_balancer.heads)

    def backward(
        self,
        losses: Mapping[str, Tensor] | Tensor,
        *,
        shared: Iterable[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | Mapping[str, Any] | None = None,
        measure: Iterable[Tensor] | None = None,
        scaler: GradScaler | None = None,
        factor: float = 1.0,
        counts: Counts | None = None,
        extra: Tensor | None = None,
        further: Sequence[Mapping[str, Tensor] | Tensor] | None = None,
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

        With several processes (torch.distributed) the step has the mean losses over the samples of all ranks, and every rank
        must make it. ``.grad`` and weights are then equal on all ranks. Wrap the model in DistributedDataParallel and
        compute the losses of its output; keep the balancer outside of it. A task may be absent on some ranks.

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
                ``scaler.step``. A step with an infinite or NaN loss or gradient is left for the scaler to skip. None: the
                attribute ``scaler`` of this stage.
            factor: Positive factor on all gradients that are added to ``.grad``; for accumulation over n micro-batches 1 / n.
                The rules see the losses without it. For the exact step of all micro-batches see `collect`.
            counts: Number of samples that each loss is a mean of, by task; 1 if it is not given. Needed where losses of several
                ranks, or of several calls inside of `collect`, are means of different numbers. A task with none is absent.
            extra: A further loss (a scalar) that no rule sees, such as a regulariser: its gradients are added to the direction,
                times ``factor``. Over several ranks its mean is taken.
            further: Losses of the same tasks on two further, independent batches, as a pair. A rule that needs independent
                samples (sdmgrad, modo) gets the inner products of their gradients of the shared parameters. The direction, and
                the gradients of the heads, come from ``losses``.

        Returns:
            The record of the step.

        Raises:
            ValueError: If a loss has the wrong shape or name, or a loss or gradient is not finite. Also if the losses do not
                reach the shared parameters or features. ``.grad`` is then as before.
            TypeError: If a loss is not a tensor, or ``shared`` is not an iterable of parameters.
            RuntimeError: If the graph cannot be walked once for each task, or several processes do not train one model. Also
                inside a training loop that calls the backward pass itself, if the loop has set ``backward_refusal``, unless a
                collection is open.
        """
        if self.backward_refusal and self.collection is None:
            raise RuntimeError(self.backward_refusal)
        scaler = self.scaler if scaler is None else scaler
        given = StepArguments(losses, listed(shared), features, listed(measure), scaler, factor, counts, extra, further)
        return self._run(given)

    def weights(
        self,
        losses: Mapping[str, Tensor] | Tensor,
        *,
        shared: Iterable[Tensor] | None = None,
        features: Features | None = None,
        measure: Iterable[Tensor] | None = None,
        counts: Counts | None = None,
    ) -> Report:
        """Compute the weights of a step, without changing ``.grad``, the state of a rule, or the graph of the losses.

        For an optimizer that evaluates the losses several times per step, such as LBFGS: hold ``report.total_weights`` for all
        evaluations. Each call of a rule that draws random numbers returns the numbers that the next step will draw.

        Args:
            losses: As for `backward`.
            shared: As for `backward`.
            features: As for `backward`.
            measure: As for `backward`.
            counts: As for `backward`.

        Returns:
            The record that `backward` would return.
        """
        return self._run(StepArguments(losses, listed(shared), features, listed(measure), counts=counts), is_trial=True)

    def loss(
        self,
        losses: Mapping[str, Tensor] | Tensor,
        *,
        shared: Iterable[Tensor] | None = None,
        features: Features | None = None,
        measure: Iterable[Tensor] | None = None,
        scaler: GradScaler | None = None,
        counts: Counts | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Return a scalar whose backward pass is `backward`, for training loops that call ``loss.backward()`` themselves.

        The gradient that arrives at the scalar, of accumulation or of a gradient scaler, is a factor on ``.grad`` only. The
        rules see the losses without it. The record of the step is then in `report`. The backward pass can run once.

        Args:
            losses: As for `backward`.
            shared: As for `backward`.
            features: As for `backward`.
            measure: As for `backward`.
            scaler: The GradScaler that multiplies the scalar. Without it a step whose gradients overflow is an error, not a
                step to skip. None: the attribute ``scaler`` of this stage.
            counts: As for `backward`.
            extra: As for `backward`.

        Returns:
            The sum of the losses and the extra loss. Shape ().
        """
        scaler = self.scaler if scaler is None else scaler
        given = StepArguments(losses, listed(shared), features, listed(measure), scaler, counts=counts, extra=extra)
        return deferred_loss(given, self._run)

    def collect(self, *, factor: float = 1.0) -> AbstractContextManager[Collection]:
        """Return a context in which calls of `backward` make one step together, exactly as one call with all their batches.

        Every call computes its tasks' gradients and frees its graph; on exit the rules see the mean losses and gradients of
        all calls. Calls may bring different tasks, for example one data set each. Memory: the graph of one call, and one
        gradient of all parameters for each task. Loss k of the step is the mean over the calls that have task k, weighted by
        ``counts``. The reports of the calls have no weights; the report of the step is in `report` after the context. If the
        body raises, no step is made. With ``source="features"`` the features of two calls count as features of different
        samples. Over several ranks the gradients are summed once, on exit.

        Args:
            factor: Factor on all gradients that are added to ``.grad``.

        Returns:
            The context; its value is the collection.

        Raises:
            RuntimeError: If a collection is open.
            ValueError: If ``factor`` is not a positive finite number, or the tasks are samples.
        """
        if not self.tasks:
            raise ValueError("collect() adds up the losses of lasting tasks, but with tasks=None every sample is a task.")
        return collecting(self, factor, self._finish)

    @property
    def report(self) -> Report | None:
        """Record of the last step; None before the first."""
        return self.last.report

    @torch._disable_dynamo  # type: ignore[attr-defined]  # tracing the stage is slow and fails
    def _run(self, given: StepArguments, *, is_trial: bool = False) -> Report:
        if not torch.is_grad_enabled():  # as loss.backward(), which works inside no_grad() too
            with torch.enable_grad():
                return self._run(given, is_trial=is_trial)
        self.check()
        given.check()
        if self.collection is not None and not is_trial:
            return self.collection.add(given)
        if not is_trial:
            self.last.skipped = False
        outcome = execute(self, given, prepare(self, given), is_trial=is_trial)
        return outcome.report if is_trial else self._finish(outcome)

    def _finish(self, outcome: Outcome) -> Report:
        self.last.skipped, self.last.report = outcome.skipped, outcome.report
        return outcome.report

    def estimate(
        self,
        shared: Iterable[Tensor] | None = None,
        *,
        features: Features | None = None,
        measure: Iterable[Tensor] | None = None,
    ) -> Estimate:
        """Return the memory that a step will need beyond ``losses.sum().backward()``, and the passes of the last step, if any.

        Args:
            shared: As for `backward`.
            features: With ``source="features"``: the features, or tensors of their shapes and types.
            measure: As for `backward`.

        Raises:
            ValueError: If an argument is missing or empty, or the tasks are samples, whose number is not known.
            TypeError: If an argument contains something other than parameters.
        """
        if self.gradient_balancer is None:
            return Estimate(0, 0, 0)
        if not self.tasks:
            raise ValueError("estimate() needs the number of tasks. Use Balancer(B, ...).estimate(...) for B samples.")
        if self.source == "features":
            inputs = trunk = read_features(features, computed=False)
        else:
            trunk = read_shared(shared)
            inputs = trunk if measure is None else read_shared(measure, "measure")
        return self.engine.estimate(inputs, trunk, len(self.tasks), in_blocks=self.source == "parameters")

    def __repr__(self) -> str:
        loss, gradient = self._descriptions
        chosen = [f"{name}={getattr(self, name)!r}" for name, default in _DEFAULTS.items() if getattr(self, name) != default]
        engine = {"engine": (self.engine.choice, "auto"), "memory": (self.engine.memory, "jacobian")}
        chosen += [] if self.priorities is None else [f"weights={self.priorities.tolist()}"]
        chosen += [f"{name}={value!r}" for name, (value, default) in engine.items() if value != default]
        return f"Balancer({', '.join([repr(self.tasks or None), f'loss={loss}', f'gradient={gradient}', *chosen])})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Balancer:  # noqa: FBT001, FBT002
        """Move or cast, as ``.to()`` and ``.half()`` ask; the rules' state keeps its values and dtypes."""
        super()._apply(preserving(self, fn), recurse)  # type: ignore[no-untyped-call]
        return self
