"""Recorded runs of two tasks, for tests of comparisons."""

import math

from balance.comparison.recorded_run import RecordedRun

SETTINGS = {"train.lr": "0.1", "data.seed": "0", "balancer.scale": "paper"}


def run(
    loss="ls", gradient=None, seed=0, *, error=1.0, accuracy=0.5, settings=None, finished=True, step_ms=math.nan, run_id=""
):
    metrics = {"a/error": error, "b/accuracy": accuracy} if finished else {}
    return RecordedRun(
        run_id or f"{loss}-{gradient}-{seed}", loss, gradient, seed, SETTINGS | (settings or {}), metrics, finished, step_ms
    )
