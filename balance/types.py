"""Named shapes, used in every signature. K tasks, P shared parameters.

A loss balancer maps `Losses` to `WeightedLosses`. A gradient balancer maps a `Gramian` to `Weights`; one that must see
every coordinate maps a `Jacobian` to a `Direction`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

Losses: TypeAlias = Tensor  #: (K,), one value per task
WeightedLosses: TypeAlias = Tensor  #: (K,), the output of a loss balancer, differentiable
Jacobian: TypeAlias = Tensor  #: (K, P), rows are task gradients
Gramian: TypeAlias = Tensor  #: (K, K), inner products of the rows
Weights: TypeAlias = Tensor  #: (K,), coefficients of the rows
Direction: TypeAlias = Tensor  #: (P,), added to .grad; parameters move along its negative

LossRule: TypeAlias = Callable[..., WeightedLosses]  #: maps Losses to WeightedLosses
GradientRule: TypeAlias = Callable[..., Tensor]  #: maps a Gramian to Weights, or a Jacobian to a Direction

Heads: TypeAlias = Literal["unweighted", "weighted"]  #: treatment of task-specific heads
Scale: TypeAlias = Literal["paper", "sum", "norm"]  #: length of the direction
Source: TypeAlias = Literal["parameters", "features"]  #: tensors at which conflict is measured
Sees: TypeAlias = Literal["gramian", "jacobian"]  #: input of a gradient balancer
EngineChoice: TypeAlias = Literal["auto", "loop", "batched"]  #: order of the backward passes
Memory: TypeAlias = Literal["jacobian", "gramian"]  #: gradients in memory

#: Problems of multi-task training that a method addresses
Remedy: TypeAlias = Literal[
    "loss scale",  # losses of different size or unit
    "gradient length",  # task gradients of different length
    "conflict",  # task gradients with negative inner products
    "training pace",  # tasks that learn at different speed
    "domination",  # one task that decides the direction
    "local minima",  # by random weights or directions
]
#: Conditions on training that a method needs
Need: TypeAlias = Literal[
    "positive losses",
    "optimizer",  # the balancer's parameters belong in the optimizer
    "observe",  # observe() after every optimizer step
    "end_epoch",  # end_epoch() once per epoch
    "validation",  # observe_validation() with losses of validation data, every few steps
    "all tasks",  # no task may be absent
    "parameters",  # source="parameters": the rule compares gradients of different steps
]
