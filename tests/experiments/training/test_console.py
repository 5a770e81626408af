import numpy as np
import pytest
import torch

from balance import Report
from experiments.training import console as display


def test_many_tasks_are_logged_in_short():
    def report(gradients):
        numbers = torch.ones(len(gradients))
        tasks = tuple(f"t{k}" for k in range(len(gradients)))
        return Report(tasks, numbers, numbers, numbers, numbers, gradients @ gradients.T)

    gradients = torch.randn(13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, whole = display.logged(report(gradients)), report(gradients).as_metrics()
    cosines = [value for name, value in whole.items() if name.startswith("cosine/")]
    assert len(cosines) == 78
    assert short["cosine/mean"] == pytest.approx(np.mean(cosines))
    assert short["cosine/min"] == pytest.approx(min(cosines))
    assert short["conflicts"] == whole["conflicts"] > 0
    assert set(short) == {name for name in whole if not name.startswith("cosine/")} | {"cosine/mean", "cosine/min"}
    assert display.logged(report(gradients[:12])) == report(gradients[:12]).as_metrics()
    metrics = {f"t{k}/f1": k / 100 for k in range(40)}
    assert display.metrics_line(metrics) == "f1 0.1950 (0.0000 to 0.3900)"
    assert display.losses_line(report(gradients)) == "losses 1 (1 to 1)"
