"""Conversations in the layout of MFTCoder: JSONL files, one folder or one file for each task.

Every line is an object with ``chat_rounds``, a list of objects with ``role`` (system, human or bot) and ``content``. Or it has
a prompt and an answer under one of the pairs of keys `PAIRS`, and perhaps ``system``. Other keys have no effect.

Source:
    The repository codefuse-ai/MFTCoder. Differs: also one file for each task, and no lines with only ``text``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

PAIRS = (
    *(("prompt", "answer"), ("prompt", "response"), ("input", "output"), ("instruction", "output")),
    *(("instruction", "response"), ("question", "response"), ("question", "answer")),
)
ROLES = {"system": "system", "human": "human", "user": "human", "bot": "bot", "assistant": "bot"}


class Turn(NamedTuple):
    """One contribution to a conversation, of the role ``system``, ``human`` or ``bot``."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


def task_names(root: Path) -> tuple[str, ...]:
    """Return the names of the tasks: sub-folders that contain JSONL files, and JSONL files without their ending.

    Args:
        root: Folder of the data set.

    Returns:
        Names in the order of the alphabet.

    Raises:
        FileNotFoundError: If there is none.
    """
    return tuple(_files(root))


def read(root: Path) -> dict[str, list[Conversation]]:
    """Read all conversations.

    Args:
        root: Folder of the data set.

    Returns:
        Conversations by task.

    Raises:
        FileNotFoundError: If there is no task.
        ValueError: If a line has another form; the message names the file and the line.
    """
    return {task: [entry for file in files for entry in _read_file(file)] for task, files in _files(root).items()}


def _files(root: Path) -> dict[str, list[Path]]:
    """Return the files of each task.

    Raises:
        FileNotFoundError: If there is no task.
        ValueError: If a task has both a file and a folder.
    """
    single = {file.stem: [file] for file in root.glob("*.jsonl")}
    folders = {folder.parent.name: sorted(folder.parent.glob("*.jsonl")) for folder in root.glob("*/*.jsonl")}
    if both := sorted(single.keys() & folders.keys()):
        raise ValueError(f"{root} must have a file or a folder for each task, but has both for '{both[0]}'. Remove one.")
    files = single | folders
    if not files:
        raise FileNotFoundError(
            f"data.path must be a folder with one JSONL file, or one folder of JSONL files, for each task, but {root} has none."
        )
    return {task: files[task] for task in sorted(files)}


def _read_file(file: Path) -> list[Conversation]:
    conversations = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                conversations.append(_conversation(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    return conversations


def _conversation(entry: Any) -> Conversation:
    """Return the turns of an entry: a system text or none, then humans and bots in alternation, a bot last.

    Raises:
        ValueError: If it has another form.
    """
    turns = tuple(_turns(entry)) if isinstance(entry, dict) else ()
    dialogue = turns[1:] if turns and turns[0].role == "system" else turns
    if not dialogue or [turn.role for turn in dialogue] != ["human", "bot"] * (len(dialogue) // 2):
        roles = ", ".join(turn.role for turn in turns) or "no turns"
        raise ValueError(f"a conversation must have human and bot in alternation, after an optional system, but got {roles}.")
    return turns


def _turns(entry: dict[str, Any]) -> list[Turn]:
    """Return the turns of an entry in either form.

    Raises:
        ValueError: If it has neither form, or a role or a text is wrong.
    """
    rounds = entry.get("chat_rounds")
    if rounds is None:
        pair = next((pair for pair in PAIRS if pair[0] in entry and pair[1] in entry), None)
        if pair is None:
            raise ValueError(f"an entry must have chat_rounds, or prompt and answer, but has {', '.join(entry) or 'no keys'}.")
        rounds = [{"role": role, "content": entry[key]} for role, key in zip(("human", "bot"), pair, strict=True)]
        rounds = [{"role": "system", "content": entry["system"]}, *rounds] if entry.get("system") else rounds
    return [_turn(turn) for turn in rounds]


def _turn(turn: Any) -> Turn:
    """Return one turn.

    Raises:
        ValueError: If its role or its text is wrong.
    """
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"a turn must have a role (one of {', '.join(ROLES)}) and a text as content, but got {turn!r:.80}.")
    return Turn(ROLES[role], content)
