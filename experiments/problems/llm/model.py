"""A language model whose adapters are the shared parameters; there are no heads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from balance.config import check_settings, setting
from experiments.problems.base import Network
from experiments.problems.llm import pretraining
from experiments.problems.llm.data import cache_folder
from experiments.problems.llm.tasks import NOTHING, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass
class ModelConfig:
    """A model on disk, or a tiny one that is pre-trained once; and its adapters."""

    path: str | None = setting(None, help="folder of a causal language model; null: a tiny model of Python code")
    cache: str | None = setting(None, help="folder for the tiny model; the file of the problem sets it to data.cache")
    width: int = setting(144, minimum=1, help="width of the tiny model")
    layers: int = setting(2, minimum=1, help="layers of the tiny model")
    attention_heads: int = setting(4, minimum=1, help="attention heads of the tiny model, an even part of its width")
    pretraining_steps: int = setting(600, minimum=0, help="steps in which the tiny model is pre-trained; 0: random weights")
    rank: int = setting(8, minimum=1, help="rank of the adapters")
    alpha: float = setting(16.0, above=0, help="scale of the adapters, times their rank")
    dropout: float = setting(0.0, minimum=0, below=1, help="dropout of the adapters' inputs")
    gradient_checkpointing: bool = setting(default=False, help="store only the inputs of layers, and recompute the layers")


class LanguageModel(nn.Module):
    """A frozen causal language model with low-rank adapters on all its linear layers but the output.

    Args:
        model: The model, which is changed in place.
        config: Rank, scale and dropout of the adapters.
        tasks: Names of the tasks.
    """

    def __init__(self, model: PreTrainedModel, config: ModelConfig, tasks: tuple[str, ...]) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415

        if config.gradient_checkpointing:
            enable_checkpointing(model)
        adapters = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # transformers has renamed an attribute that peft reads
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.model: nn.Module = get_peft_model(model, adapters)
        self.tasks = tasks

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return logits by task, for the tasks that have tokens. One pass computes all tasks.

        Rows are padded on the right, so that attention to earlier tokens never sees padding.

        Args:
            tokens: Shape (B, K, T), with `NOTHING` for padding, and in all rows of a task without samples.

        Returns:
            Logits of the next token. Shape (B, T', V) with the longest row T'.
        """
        is_token = tokens != NOTHING
        present = is_token.any(2).any(0).nonzero().squeeze(1).tolist()
        rows = tokens[:, present, : int(is_token.sum(2).max())]
        logits = self.model(input_ids=rows.flatten(0, 1).clamp(min=0), use_cache=False).logits
        by_task = logits.view(*rows.shape, -1).unbind(1)
        return {self.tasks[k]: of_task for k, of_task in zip(present, by_task, strict=True)}


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Store only the inputs of the model's layers; each backward pass recomputes the layers, also if there are several."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the later of two names of transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


class Outputs(nn.Module):
    """The outputs of the trunk, unchanged; no parameters."""

    def forward(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return logits by task."""
        return dict(logits)


class AdaptedNetwork(Network):
    """A network whose state consists of its trained parameters, the adapters: checkpoints leave the frozen model out."""

    def state_dict(self, *args: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of the adapters and of buffers."""
        frozen = self._frozen()
        state: dict[str, Any] = super().state_dict(*args, **keywords)
        return {name: value for name, value in state.items() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Load the state of the adapters; see `torch.nn.Module.load_state_dict`.

        Args:
            state_dict: As `state_dict` returns it.
            strict: Whether a missing or an unknown entry is an error.
            assign: As in the method of torch.

        Returns:
            As the method of torch.
        """
        frozen = {name: value for name, value in super().state_dict().items() if name in self._frozen()}
        return super().load_state_dict(frozen | dict(state_dict), strict, assign)

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def build_model(config: ModelConfig | None = None, tasks: tuple[str, ...] = TASKS) -> Network:
    """Return a language model with fresh adapters: tokens (B, K, T) to logits (B, T, V) by task.

    Args:
        config: Model and adapters.
        tasks: Names of the tasks.

    Returns:
        The network. All its trained parameters are in the trunk.

    Raises:
        FileNotFoundError: If ``model.path`` is no folder.
        ValueError: If a setting is out of range.
    """
    config = config or ModelConfig()
    check_settings(config, "model")
    if config.width % (2 * config.attention_heads):
        raise ValueError(
            f"model.width must be a multiple of twice model.attention_heads={config.attention_heads}, but got {config.width}."
        )
    return AdaptedNetwork(LanguageModel(_base(config), config, tasks), Outputs())


def _base(config: ModelConfig) -> PreTrainedModel:
    """Return the model without adapters.

    Raises:
        FileNotFoundError: If ``model.path`` is no folder.
    """
    if config.path is None:
        shape = pretraining.Shape(config.width, config.layers, config.attention_heads, config.pretraining_steps)
        return pretraining.pretrained(shape, cache_folder(config.cache))
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    if not Path(config.path).expanduser().is_dir():
        raise FileNotFoundError(f"model.path must be the folder of a causal language model, but {config.path} does not exist.")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        Path(config.path).expanduser(), local_files_only=True, dtype=torch.float32
    )
    return model
