"""Two tasks in the layout of MFTCoder: a file of chat rounds, and a folder with two files of prompts and answers."""

import json

COUNT = 30  # conversations of each task


def chat(prompt, answer, system=""):
    """A line with chat rounds."""
    turns = [("human", prompt), ("bot", answer)]
    turns = [("system", system), *turns] if system else turns
    rounds = [{"role": role, "content": content, "chat_round_id": i} for i, (role, content) in enumerate(turns)]
    return {"id": 0, "data_name": "test", "chat_rounds": rounds}


def write_lines(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def write_mftcoder(root):
    """Write the tasks ``name`` and ``upper``, whose answers have unequal lengths."""
    write_lines(root / "upper.jsonl", [chat(f"word {i}", f"WORD {i}", "be brief" if i % 2 else "") for i in range(COUNT)])
    pairs = [{"prompt": f"def ?(): return {i}", "answer": f"f{i % 3}"} for i in range(COUNT)]
    write_lines(root / "name" / "first.jsonl", pairs[:20])
    write_lines(root / "name" / "second.jsonl", pairs[20:])
