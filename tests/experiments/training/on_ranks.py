"""Whole runs of the trainer on one process or several, for processes that import this module."""

import torch

from experiments.training import loop
from tests.experiments.short_runs import prepare


def train_all(rank, cases):
    """Final metrics and parameters of each run."""
    results = []
    for words in cases:
        run = prepare(*words)
        final = loop.train(run)
        results.append({"final": final, "parameters": {name: p.detach() for name, p in run.model.named_parameters()}})
    return results


def assert_equal(results, expected, **tolerance):
    for ours, theirs in zip(results, expected, strict=True):
        for name, parameter in theirs["parameters"].items():
            torch.testing.assert_close(
                ours["parameters"][name], parameter, msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )
