"""Experiments: one folder each, with its data, model, task losses and metrics. `experiments.trainer` trains any of them."""
