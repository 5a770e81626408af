"""Steps by TorchJD, if it is installed."""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from networks import Network


def installed() -> bool:
    """Return whether TorchJD is installed, and print a notice if not."""
    available = importlib.util.find_spec("torchjd") is not None
    if not available:
        print("torchjd is not installed, so it is left out: make benchmark installs it", file=sys.stderr)
    return available


def jacobian_step(network: Network, aggregator: str) -> Callable[[], None]:
    """Return a step that aggregates the Jacobian of the trunk, which TorchJD computes from the Jacobian of the features."""
    from torchjd import aggregation  # noqa: PLC0415
    from torchjd.autojac import jac_to_grad, mtl_backward  # noqa: PLC0415

    aggregate = getattr(aggregation, aggregator)()

    def step() -> None:
        features, losses = network()
        mtl_backward(losses, features=features)
        jac_to_grad(network.trunk.parameters(), aggregate)

    return step


def gramian_step(network: Network, weighting: str) -> Callable[[], None]:
    """Return a step by TorchJD's Gramian engine, on a copy, since its hooks allow no forward pass without a backward pass."""
    from torchjd import aggregation  # noqa: PLC0415
    from torchjd.autogram import Engine  # noqa: PLC0415

    weigh, twin = getattr(aggregation, weighting)(), copy.deepcopy(network)
    engine = Engine(twin.trunk, batch_dim=None)

    def step() -> None:
        twin.zero_grad()
        losses = torch.stack(twin()[1])
        losses.backward(weigh(engine.compute_gramian(losses)))

    return step


def sample_gramian_step(
    network: torch.nn.Module, losses: Callable[[torch.nn.Module], torch.Tensor], weighting: str
) -> Callable[[], None]:
    """Return a step by TorchJD's Gramian engine with one loss per sample, given the losses of a network."""
    from torchjd import aggregation  # noqa: PLC0415
    from torchjd.autogram import Engine  # noqa: PLC0415

    weigh, engine = getattr(aggregation, f"{weighting}Weighting")(), Engine(network, batch_dim=0)

    def step() -> None:
        network.zero_grad()
        values = losses(network)
        values.backward(weigh(engine.compute_gramian(values)))

    return step
