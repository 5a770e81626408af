"""Random numbers of one rule: seeded, saved in its state_dict, independent of torch's global generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class SeededGenerator(nn.Module):
    """A generator on the host, so that every device and every rank with the same seed draws the same numbers.

    Args:
        seed: Start of the sequence.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def reseed(self, seed: int) -> None:
        """Start the sequence of ``seed``, as a new generator with that seed would."""
        self._generator.manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw independent standard normal numbers, float64."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def uniform(self, count: int) -> Tensor:
        """Draw independent numbers, uniform on 0..1, float32. Shape (count,)."""
        return torch.rand(count, generator=self._generator, dtype=torch.float32, device="cpu")

    def permutations(self, count: int, length: int) -> Tensor:
        """Draw independent uniform permutations of 0..length-1. Shape (count, length)."""
        return torch.rand(count, length, generator=self._generator, dtype=torch.float64, device="cpu").argsort(dim=1)

    def orders_of_others(self, count: int) -> Tensor:
        """Draw the numbers of `permutations`, and return each permutation without its index. Shape (count, count - 1)."""
        draws = torch.rand(count, count, generator=self._generator, dtype=torch.float64, device="cpu").numpy()
        draws.ravel()[:: count + 1] = 2  # above all draws, so that each index comes last and is cut off
        return torch.from_numpy(draws.argsort(axis=1, kind="stable")[:, :-1])

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator, for state_dict."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the sequence from the point at which ``state`` was saved."""
        self._generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be pickled in every supported version of torch, but its state can
        return self.__dict__ | {"_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator("cpu")
        generator.set_state(state["_generator"])
        super().__setstate__(state | {"_generator": generator})  # type: ignore[no-untyped-call]
