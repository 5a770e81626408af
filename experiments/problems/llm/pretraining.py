"""A tiny language model of Python code, trained once on the standard library and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from experiments.datasets import standard_library
from experiments.datasets.image_cache import build_once
from experiments.problems.llm.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

LENGTH = 128  # tokens of a training text
BATCH = 16
LR, DECAY = 3e-3, 0.1
WARMUP = 20  # steps


class Shape(NamedTuple):
    """Size of the model, and number of its training steps."""

    width: int
    layers: int
    heads: int
    steps: int


def pretrained(shape: Shape, cache: Path) -> PreTrainedModel:
    """Return the pre-trained model; train it if the cache does not have it.

    One process trains, and the others wait. Random numbers of this process do not change.

    Args:
        shape: Size and number of steps.
        cache: Folder of the trained models.

    Returns:
        A `LlamaForCausalLM`.

    Raises:
        OSError: If ``cache`` cannot be written.
    """
    versions = json.dumps([shape, platform.python_version(), torch.__version__, Path(__file__).read_text(encoding="utf-8")])
    file = cache / f"model-{hashlib.sha256(versions.encode()).hexdigest()[:16]}.pt"
    build_once(file, file.exists, lambda partial: torch.save(_train(shape).state_dict(), partial))
    with torch.random.fork_rng(devices=[]):
        model = fresh(shape)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def fresh(shape: Shape) -> PreTrainedModel:
    """Return a model with random weights, whose tokens are bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=ByteTokenizer.size,
        hidden_size=shape.width,
        intermediate_size=8 * shape.width // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ByteTokenizer.end,
        use_cache=False,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return model


def _train(shape: Shape) -> PreTrainedModel:
    """Return a model that is trained on the library's training files; show the progress."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fresh(shape).train()
        texts = training_texts()
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, shape.steps))
        console = Console(file=sys.stderr)
        for _ in track(range(shape.steps), "Pre-training the model, once", console=console, transient=True):
            batch = texts[torch.randint(len(texts), (BATCH,))].long()
            optimizer.zero_grad()
            next_token_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
    return model


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: a linear rise, then half a cosine."""
    return min((step + 1) / WARMUP, 1.0) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2


def next_token_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token after the tokens before it. Shape (B, T) -> ()."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_texts() -> Tensor:
    """Return pieces of the library's training files as tokens. Shape (N, LENGTH), int16.

    A file is a human turn with its path and a bot turn with its text. Files follow one another, and pieces begin anywhere.
    """
    tokenizer = ByteTokenizer()
    pieces: list[Sequence[int]] = []
    for path, text in standard_library.sources("train"):
        pieces += [tokenizer.marker("human"), tokenizer.encode(path), tokenizer.marker("bot"), tokenizer.encode(text)]
        pieces.append((tokenizer.end,))
    tokens = np.concatenate(
        [np.array(memoryview(piece) if isinstance(piece, bytes) else piece, dtype=np.int16) for piece in pieces]
    )
    return torch.from_numpy(tokens[: len(tokens) - len(tokens) % LENGTH]).view(-1, LENGTH)
