"""Warnings that a stage gives once: of calls that are probably forgotten, and of parameters that are probably a head."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from ..messages import warn_caller

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from ..rules.protocol import LossBalancer

_SILENT_STEPS = {"observation": 50, "epochs": 200, "validation": 200}  # after which a missing call is probably forgotten
_NEEDS = {kind: attrgetter(f"needs_{kind}") for kind in _SILENT_STEPS}
_UNCHANGED_STEPS = 50  # after which the balancer's parameters are probably in no optimizer
_CALLS = {
    "observation": "observe(losses) after each optimizer step",
    "epochs": "end_epoch() after each epoch",
    "validation": "observe_validation(losses) every few steps",
}


class Reminders:
    """Warnings of one stage, each given once.

    Args:
        description: Name and options of the loss balancer, for messages.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._silent_steps = dict.fromkeys(_SILENT_STEPS, 0)  # -1: called, or warned of
        self._steps = 0  # with the same parameters of the balancer; -1: they have changed, or been warned of
        self._first_parameters: list[tuple[Tensor, int]] = []  # values and versions
        self._warned_of_single_reach = False

    def observed(self) -> None:
        """Note a call of ``observe``."""
        self._silent_steps["observation"] = -1

    def epoch_ended(self) -> None:
        """Note a call of ``end_epoch``."""
        self._silent_steps["epochs"] = -1

    def validated(self) -> None:
        """Note a call of ``observe_validation``."""
        self._silent_steps["validation"] = -1

    def after_step(self, rule: LossBalancer, parameters: Iterable[Tensor]) -> None:
        """Count a step, and warn of calls and of an optimizer that the loss balancer needs and has lacked for many steps.

        Args:
            rule: The loss balancer.
            parameters: Parameters of the stage.
        """
        if self._steps >= 0:
            self._check_parameters(parameters)
        for kind, steps in self._silent_steps.items():
            if steps < 0 or not _NEEDS[kind](rule):
                continue
            self._silent_steps[kind] = steps + 1
            if steps + 1 == _SILENT_STEPS[kind]:
                self._silent_steps[kind] = -1
                warn_caller(
                    f"The loss balancer {self._description} needs balancer.{_CALLS[kind]}, but {_SILENT_STEPS[kind]} steps "
                    "have passed without it, and its weights do not change. Ignore this if the call is still to come."
                )

    def _check_parameters(self, parameters: Iterable[Tensor]) -> None:
        """Warn of parameters that have the values of the first step: they are probably in no optimizer."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if self._steps == 0:
            self._first_parameters = [(values.detach().clone(), values._version) for values in trained]
        self._steps += 1
        if trained and self._steps <= _UNCHANGED_STEPS:
            return
        self._steps = -1
        if trained and all(map(_is_unchanged, trained, self._first_parameters)):
            warn_caller(
                f"The parameters of the balancer have not changed in {_UNCHANGED_STEPS} steps, so that {self._description} "
                "does not learn. Give balancer.parameters() to the optimizer. Ignore this if its first step is still to come."
            )
        self._first_parameters = []

    def check_shared(self, tasks: Sequence[str], inputs: Sequence[Tensor], reaches: Sequence[Sequence[bool]]) -> None:
        """Warn of shared parameters that only one task reaches: they are probably a head.

        Args:
            tasks: Names of the K tasks.
            inputs: The shared parameters.
            reaches: For each parameter and each task, whether the task reaches the parameter.
        """
        if self._warned_of_single_reach or sum(map(any, zip(*reaches, strict=True))) < 2:
            return
        single = [i for i, by_task in enumerate(reaches) if sum(by_task) == 1]
        if single:
            self._warned_of_single_reach = True
            first = single[0]
            task, shape = tasks[list(reaches[first]).index(True)], tuple(inputs[first].shape)
            warn_caller(
                f"shared must hold parameters that several tasks reach, but a parameter of shape {shape} is reached by "
                f"task '{task}' only ({len(single)} such in all). If it belongs to a head, leave it out of shared."
            )


def _is_unchanged(parameter: Tensor, first: tuple[Tensor, int]) -> bool:
    values, version = first
    # Most optimizers leave a new version, which needs no look at the values
    if parameter._version != version or parameter.shape != values.shape:
        return False
    return torch.equal(parameter.detach().to(values.device), values)
