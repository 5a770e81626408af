import pytest

from experiments.datasets import standard_library
from experiments.datasets.standard_library import SPLITS, functions, parsed, sources, split_of

SOURCE = '''
class Stack:
    @property
    def size(self, *,
             deep=False):
        """Number of entries.

        More text.
        """
        return len(self.entries)  # a comment

    def short(self): """On one line."""

    def only_documented(self):
        """Nothing follows."""

def plain(x):
    y = x
    return y
'''


def test_pieces_of_functions():
    assert list(parsed(SOURCE)) == [
        ("plain", "def plain(x):\n", "", "    y = x\n    return y\n"),
        (
            "size",
            "def size(self, *,\n         deep=False):\n",
            "Number of entries.",
            "    return len(self.entries)  # a comment\n",
        ),
    ]


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return functions(tmp_path_factory.mktemp("functions"), 10)


def test_no_function_is_in_two_splits(some):
    files = {split: {function.file for function in some if function.split == split} for split in SPLITS}
    assert all(files.values())
    assert all(split_of(file) == split for split in SPLITS for file in files[split])
    codes = ["".join((function.header + function.body).split()) for function in some]
    assert len(set(codes)) == len(codes)


def test_a_copy_in_another_split_is_left_out(monkeypatch, tmp_path):
    texts = {"train": SOURCE, "validation": SOURCE.replace("    ", "  "), "test": SOURCE.replace("return y", "return -y")}
    monkeypatch.setattr(standard_library, "sources", lambda split, files: [(f"{split}.py", texts[split])])
    assert [(function.split, function.name) for function in functions(tmp_path)] == [
        (split_of("train.py"), "plain"),
        (split_of("train.py"), "size"),
        (split_of("test.py"), "plain"),
    ]


def test_functions_are_read_once(some, monkeypatch, tmp_path):
    assert functions(tmp_path, 10) == some
    monkeypatch.setattr(standard_library, "parsed", None)
    assert functions(tmp_path, 10) == some


def test_files_of_the_library():
    paths = [path for path, _ in sources("train", 30)]
    assert paths == sorted(paths)
    assert len(paths) == 30
    assert not any("test" in path.split("/") or "site-packages" in path for path in paths)
    assert sum(split_of(f"{i}.py") == "train" for i in range(1000)) == pytest.approx(800, abs=60)
