"""Fine-tuning of a language model on several tasks of code, with LoRA adapters as the shared parameters.

By default the data are short functions of the installed Python's standard library, and the model is a tiny one that is
pre-trained on the library once. So the numbers depend on the version of Python. ``data.path=FOLDER`` reads JSONL files in the
layout of MFTCoder, and ``model.path=FOLDER`` a model with its tokenizer.

    completion       second half of a function from its first half
    docstring        first line of the docstring from the code
    code             code from signature and docstring
    name             name of a function from its code; also the share of names that greedy decoding gives exactly

Loss of all tasks: cross-entropy of the answer's tokens. With ``data.aggregation=task`` it is the mean over the tokens of the task,
as in MFTCoder. With ``tokens`` every token of a batch has the same weight.
"""

from __future__ import annotations

from importlib.util import find_spec

for library in ("transformers", "peft"):
    if find_spec(library) is None:
        raise ModuleNotFoundError(f"The experiment 'llm' needs {library}: pip install 'mtl-balance[llm]'.")

from experiments.problems.llm.data import ON_DISK, DataConfig, load, tasks
from experiments.problems.llm.model import ModelConfig, build_model
from experiments.problems.llm.tasks import HIGHER_IS_BETTER, TASKS, counts, losses, metrics, micro_batches, score, targets

__all__ = [
    "HIGHER_IS_BETTER",
    "ON_DISK",
    "TASKS",
    "DataConfig",
    "ModelConfig",
    "build_model",
    "counts",
    "load",
    "losses",
    "metrics",
    "micro_batches",
    "score",
    "targets",
    "tasks",
]
