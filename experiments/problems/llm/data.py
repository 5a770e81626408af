"""Conversations by task: functions of the standard library, or JSONL files."""

from __future__ import annotations

import os
import platform
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from balance.config import check_settings, setting
from experiments.datasets import standard_library
from experiments.datasets.layouts import mftcoder
from experiments.datasets.layouts.mftcoder import Turn
from experiments.problems.base import Splits, check_source
from experiments.problems.llm.tasks import NOTHING, TASKS
from experiments.problems.llm.tokenizer import ByteTokenizer, ModelTokenizer, sample_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.datasets.layouts.mftcoder import Conversation
    from experiments.datasets.standard_library import Function
    from experiments.problems.llm.tokenizer import Sample, Tokenizer

    Conversations = dict[str, dict[str, list[Conversation]]]  # by split and task

ON_DISK = "jsonl"
HELD_OUT = 0.05  # share of the conversations of JSONL files for validation, and for test


@dataclass
class DataConfig:
    """Conversations, their tokens, and the numbers of tokens that divide the losses."""

    source: str = setting(
        "functions", choices=("functions", ON_DISK), help="functions of the installed Python, or files; data.path implies jsonl"
    )
    path: str | None = setting(None, help="folder with one JSONL file, or one folder of JSONL files, for each task")
    cache: str | None = setting(
        None, help="folder for functions and the pre-trained model; null: balance/llm in the user's cache"
    )
    tokenizer: str | None = setting(None, help="folder of a tokenizer; null: bytes")
    aggregation: str = setting(
        "task",
        choices=("task", "tokens"),
        help="task: a loss is the mean over the tokens of its task; tokens: the sum, over the mean number of tokens of a task",
    )
    python: str | None = setting(
        platform.python_version(), help="version of the running Python, whose functions are read; recorded with the run"
    )
    files: int | None = setting(None, minimum=1, help="source files of each split, at most; null: all")
    max_length: int = setting(160, minimum=2, help="tokens of a conversation; longer ones are left out")
    seed: int = setting(0, minimum=0, help="seed of the choice of samples, and of the split of JSONL files")
    train_samples: int | None = setting(None, minimum=1, help="training samples of a task, at most; null: all")
    validation_samples: int | None = setting(None, minimum=1, help="validation samples of a task, at most; null: all")
    test_samples: int | None = setting(None, minimum=1, help="test samples of a task, at most; null: all")


class Mixture(Dataset[tuple[Tensor, ...]]):
    """Samples of all tasks. Item i has sample i of every task; a task with fewer samples begins again.

    Batches are tokens (B, K, T), answers (B, K, T), and the numbers of tokens that divide the losses (K,). Rows are padded by
    `NOTHING` on the right, to the longest row of the batch.

    Args:
        samples: Samples of every task.
        aggregation: Divisor of a loss. ``"task"``: the number of tokens of its task. ``"tokens"``: the mean number of tokens of
            a task. The sum of all losses is then K times the mean over all tokens.
    """

    def __init__(self, samples: Sequence[Sequence[Sample]], aggregation: str) -> None:
        self.samples = samples
        self.aggregation = aggregation

    def __len__(self) -> int:
        return max(map(len, self.samples))

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = [of_task[i % len(of_task)] for i in indices for of_task in self.samples]
        tokens = torch.full((len(rows), max(len(row.tokens) for row in rows)), NOTHING)
        answers = torch.zeros(tokens.shape, dtype=torch.bool)
        for r, row in enumerate(rows):
            tokens[r, : len(row.tokens)] = torch.tensor(row.tokens)
            answers[r, : len(row.tokens)] = torch.tensor(row.answers)
        tokens, answers = (part.view(len(indices), len(self.samples), -1) for part in (tokens, answers))
        numbers = answers[..., 1:].sum((0, 2)).double()  # no token comes before the first one
        return tokens, answers, numbers if self.aggregation == "task" else numbers.mean().expand_as(numbers).clone()


def task_names(config: DataConfig) -> tuple[str, ...]:
    """Return the names of the tasks: the four tasks of functions, or the names of the files and folders in ``data.path``."""
    return TASKS if config.path is None else mftcoder.task_names(Path(config.path).expanduser())


def load(config: DataConfig) -> Splits:
    """Return the samples of all tasks, in three splits.

    Functions are split by their files, JSONL files 90 : 5 : 5. Entries of a task with equal prompts are in one split.

    Args:
        config: Source, tokens and size of the data.

    Returns:
        Data sets of tokens, answers and divisors.
    """
    check_settings(config, "data")
    check_source(config.source, config.path, ON_DISK, "a JSONL file or a folder of JSONL files for each task")
    tokenizer: Tokenizer = ByteTokenizer() if config.tokenizer is None else ModelTokenizer(config.tokenizer)
    by_split = _from_functions(config) if config.path is None else _from_files(config)
    sizes = (config.train_samples, config.validation_samples, config.test_samples)
    splits = []
    for split, size in zip(standard_library.SPLITS, sizes, strict=True):
        samples = [_samples(by_split, split, task, size, tokenizer, config) for task in task_names(config)]
        splits.append(Mixture(samples, config.aggregation))
    return Splits(*splits)


def cache_folder(cache: str | None) -> Path:
    """Return the folder of the cache that ``data.cache`` names."""
    if cache is not None:
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "balance" / "llm"


def _samples(
    by_split: Conversations, split: str, task: str, size: int | None, tokenizer: Tokenizer, config: DataConfig
) -> list[Sample]:
    """Return conversations in tokens, in random order, without those that are too long; of files, a warning gives their number.

    Args:
        by_split: Conversations by split and task.
        split: Name of the split.
        task: Name of the task.
        size: Greatest number of samples; None for all.
        tokenizer: Map from texts to tokens.
        config: Longest sample, and seed of the order.

    Returns:
        At least one sample.

    Raises:
        ValueError: If no conversation is left.
    """
    conversations, too_long = by_split[split][task], 0
    samples: list[Sample] = []
    for i in torch.randperm(len(conversations), generator=torch.Generator().manual_seed(config.seed)).tolist():
        if len(samples) == size:
            break
        sample = sample_of(conversations[i], tokenizer)
        is_short = len(sample.tokens) <= config.max_length
        samples += [sample] if is_short else []
        too_long += not is_short
    number = f"{too_long} of {too_long + len(samples)} {split} samples of '{task}' have more than {config.max_length} tokens"
    if not samples:
        raise ValueError(f"'{task}' must have {split} samples, but {number}. Increase data.max_length, or give more data.")
    if too_long and config.path is not None:
        warnings.warn(f"{number}, and are left out. data.max_length sets the limit.", stacklevel=5)
    return samples


def _from_functions(config: DataConfig) -> Conversations:
    """Return the four tasks of the functions of the standard library, by split and task.

    Raises:
        ValueError: If the configuration is for another version of Python.
    """
    running = platform.python_version()
    if config.python not in (None, running):
        raise ValueError(f"data.python must be {running}, the version that runs, but got {config.python}. Leave it out.")
    by_split: Conversations = {split: {task: [] for task in TASKS} for split in standard_library.SPLITS}
    for function in standard_library.functions(cache_folder(config.cache), config.files):
        for task, conversation in conversations_of(function).items():
            by_split[function.split][task].append(conversation)
    return by_split


def conversations_of(function: Function) -> dict[str, Conversation]:
    """Return the conversations about a function, by task: a short request with its text, and the answer.

    Args:
        function: A function. Without a docstring it has only the tasks completion and name.

    Returns:
        Conversations. In the code whose name is asked for, every occurrence of the name is a question mark.
    """
    code = function.header + function.body
    lines = code.splitlines(keepends=True)
    half = len(lines) // 2
    masked = "".join("?" if word == function.name else word for word in re.split(r"(\W+)", code))
    asked = {"completion": ("".join(lines[:half]), "".join(lines[half:])), "name": (masked, function.name)}
    if function.docstring:
        asked |= {
            "docstring": (code, function.docstring),
            "code": (function.header + function.docstring + "\n", function.body),
        }
    return {task: (Turn("human", f"{task}:\n{prompt}"), Turn("bot", answer)) for task, (prompt, answer) in asked.items()}


def _from_files(config: DataConfig) -> Conversations:
    """Return the conversations of the JSONL files, by split and task."""
    by_task = mftcoder.read(Path(config.path or "").expanduser())
    parts = {task: _split(conversations, config.seed) for task, conversations in by_task.items()}
    return {split: {task: parts[task][i] for task in parts} for i, split in enumerate(standard_library.SPLITS)}


def _split(conversations: Sequence[Conversation], seed: int) -> tuple[list[Conversation], ...]:
    """Return training, validation and test conversations; conversations with equal first prompts are in one split."""
    prompts = list(dict.fromkeys(_prompt(conversation) for conversation in conversations))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(round(HELD_OUT * len(prompts)), 1)
    place = {prompts[i]: min(rank // held_out, 2) for rank, i in enumerate(order)}  # validation, test, then training
    split: tuple[list[Conversation], ...] = ([], [], [])
    for conversation in conversations:
        split[(place[_prompt(conversation)] + 1) % 3].append(conversation)
    return split


def _prompt(conversation: Conversation) -> str:
    return next(turn.content for turn in conversation if turn.role == "human")
