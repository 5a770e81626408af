import json

import pytest

from experiments.datasets.layouts.mftcoder import PAIRS, Turn, read, task_names
from tests.writers.mftcoder import COUNT, chat, write_lines, write_mftcoder


def test_files_and_folders_are_tasks(tmp_path):
    write_mftcoder(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("no task")
    assert task_names(tmp_path) == ("name", "upper")
    conversations = read(tmp_path)
    assert [len(conversations[task]) for task in ("name", "upper")] == [COUNT, COUNT]
    assert conversations["upper"][1] == (Turn("system", "be brief"), Turn("human", "word 1"), Turn("bot", "WORD 1"))
    assert conversations["upper"][2] == (Turn("human", "word 2"), Turn("bot", "WORD 2"))
    assert conversations["name"][20] == (Turn("human", "def ?(): return 20"), Turn("bot", "f2"))


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_keys(pair, tmp_path):
    write_lines(tmp_path / "task.jsonl", [{pair[0]: "a", pair[1]: "b", "system": "s", "id": 3}])
    assert read(tmp_path) == {"task": [(Turn("system", "s"), Turn("human", "a"), Turn("bot", "b"))]}


def test_several_rounds_and_other_names_of_roles(tmp_path):
    rounds = [{"role": role, "content": role} for role in ("user", "assistant", "human", "bot")]
    (tmp_path / "task.jsonl").write_text("\n" + json.dumps({"chat_rounds": rounds}) + "\n\n")
    assert [turn.role for turn in read(tmp_path)["task"][0]] == ["human", "bot", "human", "bot"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text": "only"}, "must have chat_rounds, or prompt and answer, but has text"),
        ({"chat_rounds": []}, "human and bot in alternation, .* but got no turns"),
        ({"chat_rounds": chat("a", "b")["chat_rounds"][:1]}, "but got human"),
        ({"chat_rounds": chat("a", "b")["chat_rounds"][::-1]}, "but got bot, human"),
        ({"prompt": "a", "answer": 3}, "a text as content, but got .*3"),
        ({"chat_rounds": [{"role": "robot", "content": "a"}]}, "one of system, human, user, bot, assistant"),
        ({"chat_rounds": ["a"]}, "but got 'a'"),
        (["a"], "but got no turns"),
    ],
)
def test_other_forms_are_refused(entry, message, tmp_path):
    write_lines(tmp_path / "task.jsonl", [chat("a", "b"), entry])
    with pytest.raises(ValueError, match=rf"task\.jsonl, line 2: .*{message}"):
        read(tmp_path)


def test_folders_without_tasks_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"data\.path must be a folder with one JSONL file"):
            task_names(folder)
    write_mftcoder(tmp_path)
    write_lines(tmp_path / "upper" / "more.jsonl", [chat("a", "b")])
    with pytest.raises(ValueError, match="has both for 'upper'"):
        read(tmp_path)
