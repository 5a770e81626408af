"""Task names in a checkpoint: saved as a tensor, checked when the checkpoint is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SEPARATOR = "\0"


def encode_tasks(tasks: Sequence[str]) -> Tensor:
    """Return the names as one tensor: their UTF-8 bytes, separated by zeros. Shape (n,), uint8."""
    return torch.tensor(list(_SEPARATOR.join(tasks).encode()), dtype=torch.uint8, device="cpu")


def check_tasks(state: Tensor, tasks: Sequence[str], owner: str) -> None:
    """Check that a checkpoint was saved for the same tasks.

    Args:
        state: Saved names, as `encode_tasks` returns them.
        tasks: Names that the module has.
        owner: Name of the module's class, for the message.

    Raises:
        ValueError: If the names or their order differ.
    """
    text = bytes(state.to("cpu", torch.uint8).tolist()).decode()
    saved = tuple(text.split(_SEPARATOR)) if text else ()
    if saved != tuple(tasks):
        raise ValueError(f"The checkpoint is of tasks {saved}, but this {owner} is for {tuple(tasks)}.")
