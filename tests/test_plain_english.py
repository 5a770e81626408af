import pytest

from tests import plain_english
from tests.plain_english import Prose, judge, of_comments, of_docstring, of_markdown

LONG = "word " * 25 + "word."


@pytest.mark.slow
def test_prose_is_plain_english():
    broken = [v for v in plain_english.violations() if not plain_english.is_listed(v.path)]
    assert not broken, "\n" + "\n".join(map(str, broken))


@pytest.mark.parametrize(
    "text",
    [
        "It stands beside the file.",
        "The device is not to be had.",
        "A folder of its own.",
        "The file is not there.",
        "The stage knows the rule.",
        "What is kept is small.",
        "Numbers -> advice.",
        "a; b; c.",
        LONG,
    ],
)
def test_words_to_avoid_are_found(text):
    assert list(judge(Prose("comment", 1, text)))


@pytest.mark.parametrize(
    "text",
    [
        "Besides, it is the same file.",
        "Use `what is there` beside_it.",
        "Is there a file?",
        "Shape (K, P) -> (K,).",
        "Shape (…, k) -> (…).",
        "Leave the float64 state alone.",
        "What is it?",
        "Two can be told apart.",
        "word " * 20 + "word, e.g. word. Word " + "word " * 20,
        "word " * 20 + "``word word word word word word word``.",
    ],
)
def test_plain_sentences_pass(text):
    assert not list(judge(Prose("comment", 1, text)))


def test_docstring_is_read_by_paragraph_and_entry():
    text = """Return it.

    losses (K,) -> rule -> weights
                -> direction

        indented -> block

    * one
      item
    * two

    Args:
        a: First
            entry.
        b: Second.

    Returns:
        The result.
    """
    read = [(prose.line, prose.text) for prose in of_docstring(text, 1)]
    assert read == [
        (1, "Return it."),
        (8, "one item"),
        (10, "two"),
        (13, "First entry."),
        (15, "Second."),
        (18, "The result."),
    ]


def test_comments_on_following_lines_are_one():
    source = "x = 1  # a\n# b\n# c\ny = 2  # d\n# noqa: E501\n"
    assert [(prose.line, prose.text) for prose in of_comments(source)] == [(1, "a"), (2, "b c"), (4, "d")]


def test_docstring_must_not_begin_with_a_question_word():
    assert list(judge(Prose("docstring", 1, "Whether a rule is linear.", start=True)))
    assert not list(judge(Prose("docstring", 1, "Whether a rule is linear.")))


def test_markdown_is_read_without_code(tmp_path):
    (tmp_path / "a.md").write_text("# Title\n\nOne\ntwo.\n\n```\nbeside\n```\n\n| a | b |\n", encoding="utf-8")
    assert [(prose.line, prose.text) for prose in of_markdown(tmp_path / "a.md")] == [(3, "One two."), (10, "a"), (10, "b")]
