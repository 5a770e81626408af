"""Random numbers that a rule owns: seeded, saved in its state_dict, apart from torch's global generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class SeededGenerator(nn.Module):
    """A generator on the host, so that every device and every rank with the same seed draws the same numbers.

    Args:
        seed: Where the sequence starts.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Independent standard normal numbers, float64."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def uniform(self, count: int) -> Tensor:
        """Independent numbers, uniform on 0..1, float32. Shape (count,)."""
        return torch.rand(count, generator=self._generator, device="cpu")

    def permutations(self, count: int, length: int) -> Tensor:
        """Independent uniform permutations of 0..length-1. Shape (count, length)."""
        return torch.rand(count, length, generator=self._generator, dtype=torch.float64, device="cpu").argsort(dim=1)

    def get_extra_state(self) -> Tensor:
        """State of the generator, for state_dict."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the sequence where ``state`` was saved."""
        self._generator.set_state(state.cpu())
