"""A balancer in the training loop of Accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..stage.balancer import Balancer
from ..stage.extra_forward import extra_forward
from ._optimizers import untrained_parameters
from ._task_losses import TaskLosses, read_task_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator
    from torch import Tensor, nn

__all__ = ["TaskLosses", "observe", "prepare"]

REFUSAL = (
    "With Accelerate, accelerator.backward(balancer.loss(losses, shared=...)) runs the step, but balancer.backward was called "
    "directly. It would ignore the accumulation of gradients. Inside of balancer.collect() direct calls are allowed."
)


def prepare(accelerator: Accelerator, balancer: Balancer) -> Balancer:
    """Prepare a balancer for ``accelerator.backward(balancer.loss(...))``. Call it after ``accelerator.prepare``.

    ``accelerator.save_state`` and ``load_state`` then include the balancer, and the balancer uses the gradient scaler of the
    accelerator. A direct call of ``balancer.backward`` is an error, except inside of ``balancer.collect()``.

    Args:
        accelerator: The accelerator, with models and optimizers prepared.
        balancer: The balancer, outside of the model or a submodule of it. Its parameters belong in a prepared optimizer.

    Returns:
        The balancer.

    Raises:
        TypeError: If ``balancer`` is no balancer.
        ValueError: If no optimizer is prepared, the parameters of the balancer are in no prepared optimizer, or the balancer
            cannot work with the accelerator.
    """
    if not isinstance(balancer, Balancer):
        raise TypeError(f"balancer must be a balance.Balancer, but got {type(balancer).__name__}.")
    _check_optimizers(accelerator, balancer)
    is_inside = any(module is balancer for model in accelerator._models for module in model.modules())
    if is_inside and accelerator.num_processes > 1:
        raise ValueError(
            f"With {accelerator.num_processes} processes the balancer must be outside of the model, but is a submodule of it. "
            "DistributedDataParallel would wrap its parameters. Take it out of the model."
        )
    if not is_inside and all(registered is not balancer for registered in accelerator._custom_objects):
        accelerator.register_for_checkpointing(balancer)
    balancer.scaler = accelerator.scaler
    balancer.backward_refusal = REFUSAL
    return balancer


def _check_optimizers(accelerator: Accelerator, balancer: Balancer) -> None:
    """Check that the prepared optimizers train the parameters of the balancer, and clear their gradients."""
    if str(accelerator.distributed_type).endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ValueError(f"{accelerator.distributed_type} runs the backward pass itself, which a balancer does not support.")
    if not accelerator._optimizers:
        raise ValueError("No optimizer is prepared. Call accelerator.prepare(model, optimizer, ...) first.")
    if missing := untrained_parameters(balancer, accelerator._optimizers):
        raise ValueError(
            f"A prepared optimizer must train the parameters of the balancer, but {missing} are not among its parameters. "
            "Add balancer.parameters() to the optimizer before accelerator.prepare."
        )


def observe(
    accelerator: Accelerator,
    balancer: Balancer,
    model: nn.Module,
    compute_losses: Callable[[], Mapping[str, Tensor]],
) -> None:
    """Let a rule learn from the losses after the optimizer's step (famo). Call it after ``optimizer.step()`` of each batch.

    It does nothing for other rules, for a micro-batch without an optimizer step, and for a step that was skipped. The losses
    are computed with the autocast of the accelerator. The statistics of batch normalisation and the random numbers do not
    change.

    Args:
        accelerator: The accelerator.
        balancer: The balancer.
        model: The prepared model.
        compute_losses: Function that returns the losses of the last batch, as a dict by task or as `TaskLosses`.
    """
    if not balancer.needs_observation or not accelerator.sync_gradients or accelerator.optimizer_step_was_skipped:
        return
    with extra_forward(model), torch.no_grad(), accelerator.autocast():
        losses = read_task_losses(compute_losses(), balancer.tasks, "compute_losses")
    balancer.observe(dict(losses), counts=losses.counts)
