"""Tokens of conversations: bytes, or the tokens of a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from experiments.datasets.layouts.mftcoder import Conversation


ROLES = ("system", "human", "bot")


class Sample(NamedTuple):
    """A conversation in tokens. The loss counts tokens of the answers only, each with the end that follows it.

    Attributes:
        tokens: Numbers of the tokens.
        answers: For each token, whether the loss counts it.
    """

    tokens: list[int]
    answers: list[bool]


class Tokenizer(Protocol):
    """A map from texts to tokens.

    Attributes:
        size: Number of different tokens.
        end: Token after an answer.
    """

    size: int
    end: int

    def marker(self, role: str) -> Sequence[int]:
        """Return the tokens that begin a turn of a role."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text, without special tokens."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, a token that begins a turn of each role, and the end of an answer."""

    size = 260
    end = 259

    def marker(self, role: str) -> Sequence[int]:
        """Return the token that begins a turn of a role."""
        return (256 + ROLES.index(role),)

    def encode(self, text: str) -> Sequence[int]:
        """Return the bytes of a text."""
        return text.encode()


class ModelTokenizer:
    """The tokenizer of a model on disk. Turns begin with the texts that MFTCoder uses: ``<s>human`` and a line break.

    Args:
        folder: Folder of the model.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the tokenizer has no token for the end of a text.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(
                f"data.tokenizer must be a folder with a tokenizer, but {folder} does not exist. It is model.path unless it is "
                "given."
            )
        self._tokenizer = AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer in {folder} must have a token for the end of a text (eos_token), but has none.")
        self.size, self.end = len(self._tokenizer), int(self._tokenizer.eos_token_id)

    def marker(self, role: str) -> Sequence[int]:
        """Return the tokens that begin a turn of a role."""
        return self.encode(f"<s>{role}\n")

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text, without special tokens."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def sample_of(conversation: Conversation, tokenizer: Tokenizer) -> Sample:
    """Return a conversation in tokens.

    Each turn is preceded by the marker of its role, and each answer is followed by the end.

    Args:
        conversation: Turns of system, human and bot.
        tokenizer: Map from texts to tokens.

    Returns:
        The sample.
    """
    sample = Sample([], [])
    for turn in conversation:
        marker, content = tokenizer.marker(turn.role), tokenizer.encode(turn.content)
        is_answer = turn.role == "bot"
        tokens = [*marker, *content, *([tokenizer.end] if is_answer else [])]
        sample.tokens.extend(tokens)
        sample.answers.extend([False] * len(marker) + [is_answer] * (len(tokens) - len(marker)))
    return sample
