"""Tests that import transformers are left out where it is not installed, as with Python 3.10, which it does not support."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformers") else ["test_processes.py", "test_transformers*.py"]
