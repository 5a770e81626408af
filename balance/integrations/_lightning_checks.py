"""Checks of a fit with Lightning, before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn.parallel import DistributedDataParallel

from ._optimizers import untrained_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import Trainer
    from torch import nn
    from torch.amp.grad_scaler import GradScaler

    from ..stage.balancer import Balancer


def scaler_of(trainer: Trainer) -> GradScaler | None:
    """Return the gradient scaler of mixed precision, if any."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def _names(balancers: Mapping[str, Balancer]) -> set[str]:
    """Return the names of all parameters and buffers of balancers in their module."""
    tensors: set[str] = set()
    for prefix, balancer in balancers.items():
        tensors |= {name for name, _ in balancer.named_parameters(prefix)} | {
            name for name, _ in balancer.named_buffers(prefix)
        }
    return tensors


def exclude_from_wrapper(module: nn.Module, balancers: Mapping[str, Balancer]) -> None:
    """Let DistributedDataParallel ignore the balancers, whose state is equal on all ranks without any communication."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ())) | _names(balancers)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)  # type: ignore[no-untyped-call]


def check_balancers(balancers: Mapping[str, Balancer]) -> None:
    """Check that a module has a balancer.

    Raises:
        ValueError: If it has none.
    """
    if not balancers:
        raise ValueError(
            "BalanceCallback needs a balancer in the LightningModule, but there is none. Add one in __init__: "
            "self.balancer = balance.Balancer(...). Lists and dicts of balancers must be nn.ModuleList or nn.ModuleDict."
        )


def check_optimizers(trainer: Trainer, balancers: Mapping[str, Balancer]) -> None:
    """Check that an optimizer has the parameters of the balancers.

    Raises:
        ValueError: If a parameter is in no optimizer.
    """
    for prefix, balancer in balancers.items():
        if missing := untrained_parameters(balancer, trainer.optimizers, prefix):
            raise ValueError(
                f"All parameters of a balancer must be in an optimizer, but {', '.join(missing)} are in none. Use "
                f"self.parameters() in configure_optimizers, or add self.{prefix}.parameters()."
            )


def check_wrapper(trainer: Trainer, balancers: Mapping[str, Balancer]) -> None:
    """Check that DistributedDataParallel ignores the balancers, and can accumulate gradients.

    Raises:
        ValueError: If it cannot.
    """
    wrapper = trainer.strategy.model
    if not isinstance(wrapper, DistributedDataParallel):
        return
    if wrapper.static_graph and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            "PyTorch cannot accumulate gradients with static_graph=True, but accumulate_grad_batches is "
            f"{trainer.accumulate_grad_batches}. Use DDPStrategy() without that option."
        )
    if not _names(balancers) <= wrapper.parameters_to_ignore:
        raise ValueError(
            f"With DistributedDataParallel a balancer must exist before the fit, but one of {', '.join(balancers)} does not. "
            "Create it in __init__ of the LightningModule, not in setup or configure_model."
        )


def check_functions(balancers: Mapping[str, Balancer], functions: Mapping[str, object], *, is_by_name: bool) -> None:
    """Check that the losses of all balancers that learn from losses between the steps can be computed.

    Args:
        balancers: The balancers, by name in the module.
        functions: Functions that compute losses of a batch, by balancer.
        is_by_name: Each function belongs to one balancer. False: all balancers share one function.

    Raises:
        ValueError: If a function is missing, or does not belong to one balancer.
    """
    needing = [name for name, balancer in balancers.items() if balancer.needs_observation or balancer.needs_validation]
    for name in needing:
        if name not in functions:
            raise ValueError(
                f"The loss balancer of '{name}' learns from losses between the steps, but there is no function that computes "
                "these losses. Add a method task_losses(batch) to the module, which returns the losses by task. Or use "
                "BalanceCallback(losses=...) with a function of module and batch."
            )
    if len(needing) > 1 and not is_by_name:
        raise ValueError(
            f"The balancers {', '.join(needing)} all learn from losses between the steps, but there is one function. Use "
            f"BalanceCallback(losses={{'{needing[0]}': ..., ...}}) with functions of module and batch."
        )


def check_validation(trainer: Trainer, balancers: Mapping[str, Balancer]) -> None:
    """Check that a fit validates, if a balancer learns from validation losses.

    Raises:
        ValueError: If it does not.
    """
    if any(balancer.needs_validation for balancer in balancers.values()) and not trainer.enable_validation:
        raise ValueError(
            "A loss balancer learns from validation losses, but the fit has no validation. Give a validation data loader and a "
            "validation_step, and leave limit_val_batches above 0."
        )
