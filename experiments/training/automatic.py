"""Choice of the methods by a diagnosis, for ``--loss_method=auto --gradient_method=auto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.config.layers import AUTO, configure, values_by_key
from experiments.training import ranks
from experiments.training.diagnosis import diagnose_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from balance.diagnosis.advice import Advice

KEYS = ("loss_method", "gradient_method")


def configure_automatic(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a run, as `configure` does; two methods ``auto`` are replaced by a diagnosis.

    The entry ``chosen_by`` of the configuration has the reason.

    Args:
        overrides: Words of the form ``key=value``.

    Raises:
        ValueError: If only one of the two methods is ``auto``, several ranks train together, or an entry is wrong.
    """
    values = values_by_key(overrides)
    if AUTO not in (values.get(key) for key in KEYS):
        return configure(overrides)
    if not all(values.get(key) == AUTO for key in KEYS):
        raise ValueError(
            "loss_method and gradient_method must both be auto, since a diagnosis chooses a pair, but got "
            f"{', '.join(f'{key}={values.get(key)}' for key in KEYS)}. Use --loss_method=auto --gradient_method=auto."
        )
    if ranks.size() > 1:
        raise ValueError(
            f"The methods must be names with torchrun, since every rank sees other batches, but got auto with {ranks.size()} "
            "processes. diagnose.py prints the pair, in one process."
        )
    common = [word for word in overrides if not word.startswith(("loss.", "gradient."))]  # options of the chosen pair
    advice = advise_network(configure([*common, "loss_method=ls", "gradient_method=none"]))
    chosen = [f"loss_method={advice.loss_method}", f"gradient_method={advice.gradient_method or 'none'}"]
    config = configure([*overrides, *chosen])
    config.chosen_by = f"a diagnosis: {advice.reason}"
    return config


def advise_network(config: DictConfig) -> Advice:
    """Return the advice of a diagnosis of the network with which a run would begin, without prices of methods."""
    return diagnose_network(config, priced=()).advice
