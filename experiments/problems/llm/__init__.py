"""Fine-tuning of a language model on several tasks of code, with LoRA adapters as the shared parameters.

By default the data are short functions of the standard library of the installed Python. The model is a tiny one, which is
pre-trained on the library once. So the numbers depend on the version of Python. ``data.path=FOLDER`` reads JSONL files in the
layout of MFTCoder, and ``model.path=FOLDER`` a model with its tokenizer.

    completion       second half of a function, from its first half
    docstring        first line of the docstring, from the code
    code             code, from signature and docstring
    name             name of a function, from its code; also the share of names that greedy decoding does not give exactly

The loss of a task is the cross-entropy of the tokens of its answers, and prompts do not count. It is the mean over the tokens
of the task, as in MFTCoder. With ``data.aggregation=tokens`` every token of a batch has the same weight.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("peft") is None:
    raise ModuleNotFoundError("The experiment 'llm' needs transformers and peft: pip install -e . --group llm.")

from experiments.problems.llm.data import ON_DISK, DataConfig, load, task_names
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
    "task_names",
]
