"""The diagonal by which an optimizer divides gradients, as a metric for their inner products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import optim

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_DIVIDE = {  # by kind of optimizer, the name of the squares in its state
    optim.Adam: "exp_avg_sq",  # AdamW is an Adam
    optim.AdamW: "exp_avg_sq",
    optim.RMSprop: "square_avg",
    optim.Adagrad: "sum",
}


class OptimizerMetric:
    r"""Diagonal P of an optimizer that takes steps :math:`-\eta P^{-1} d` along a direction d.

    P is the root of the optimizer's current average of squared gradients, plus its epsilon. The average of Adam is corrected
    for its start at zero. SGD has the identity. Learning rates of parameter groups count relative to the largest of them.
    Momentum and weight decay are left out. A coordinate has no history if all its gradients have been zero. Its entry would be
    epsilon, and its first gradient would dominate all inner products. So it gets the mean of all other entries of
    :math:`P^{-1}`, as does a parameter without state. If no coordinate has a history, P is the identity.

    Args:
        optimizer: Adam, AdamW, RMSprop, Adagrad or SGD, or a wrapper that has it as ``optimizer``.

    Raises:
        TypeError: If it is another optimizer, whose steps have no such form.
    """

    def __init__(self, optimizer: object) -> None:
        inner: Any = optimizer
        while not isinstance(inner, optim.Optimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        if not isinstance(inner, (optim.SGD, *_DIVIDE)):
            raise TypeError(
                f"metric must be an optimizer of the kind Adam, AdamW, RMSprop, Adagrad or SGD, but got "
                f"{type(inner).__name__}. The steps of other optimizers have no known diagonal."
            )
        self.optimizer = cast("optim.Optimizer", inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerMetric:
        """Return a metric of the same optimizer, or of its copy if that is copied too."""
        return OptimizerMetric(memo.get(id(self.optimizer), self.optimizer))

    def roots(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the entries of :math:`P^{-1/2}` for each parameter, in its shape.

        Args:
            parameters: Parameters of the optimizer.

        Raises:
            ValueError: If the optimizer lacks one, or its state is not finite.
        """
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        missing = sum(id(parameter) not in groups for parameter in parameters)
        if missing:
            raise ValueError(
                f"metric must be the optimizer of all shared parameters, but lacks {missing} of {len(parameters)}. "
                "Set balancer.metric to their optimizer."
            )
        diagonals = [self._diagonal(parameter, groups[id(parameter)]) for parameter in parameters]
        usual = _mean_inverse(diagonals)
        largest = max((float(groups[id(parameter)]["lr"]) for parameter in parameters), default=0.0)
        roots = []
        for parameter, diagonal in zip(parameters, diagonals, strict=True):
            rate = float(groups[id(parameter)]["lr"]) / largest if largest > 0 else 1.0
            roots.append((torch.where(diagonal == 0, usual, 1 / diagonal) * rate).sqrt())
        if not all(bool(_local(root).isfinite().all()) for root in roots):
            raise ValueError("The state of the optimizer in metric must be finite, but is not. Look at the learning rate.")
        return roots

    def _diagonal(self, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Return the entries of P of one parameter, 0 for coordinates without history."""
        if isinstance(self.optimizer, optim.SGD):
            return torch.ones_like(parameter, requires_grad=False)
        state = self.optimizer.state.get(parameter)
        if not state or not float(state["step"]):
            return torch.zeros_like(parameter, requires_grad=False)
        name = next(name for kind, name in _DIVIDE.items() if isinstance(self.optimizer, kind))
        squares: Tensor = state["max_exp_avg_sq" if group.get("amsgrad") else name].detach()
        history = squares != 0
        if name == "exp_avg_sq":
            squares = squares / (1 - float(group["betas"][1]) ** float(state["step"]))
        elif group.get("centered"):
            squares = squares - state["grad_avg"].detach().square()
        diagonal: Tensor = (squares.clamp(min=0).sqrt() + group["eps"]) * history
        return diagonal


def _mean_inverse(diagonals: Sequence[Tensor]) -> float:
    """Return the mean of the inverses of all entries that are not zero; 1 if there are none."""
    count = sum(_total(diagonal != 0) for diagonal in diagonals)
    total = sum(_total(torch.where(diagonal == 0, 0.0, 1 / diagonal)) for diagonal in diagonals)
    return total / count if count else 1.0


def _total(tensor: Any) -> float:
    """Return the sum of all entries, of a distributed tensor over all ranks."""
    total = tensor.double().sum()
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)


def _local(tensor: Any) -> Tensor:
    """Return a tensor, or this rank's shard of a distributed tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
