import math

import pytest
import torch
from torch import nn

from experiments.training import loop
from experiments.training.schedule import Schedule
from tests.experiments.short_runs import configure, prepare


def rates(scores=(), epochs=4, **options):
    """Learning rates, of 1 and 10, at each of two steps in each epoch."""
    parameters = [nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 10.0), strict=True)])
    config = configure(
        *(f"train.{key}={value}" for key, value in ({"schedule": "constant", "epochs": epochs} | options).items())
    )
    schedule = Schedule(optimizer, config.train, 2)
    seen = []
    for epoch in range(epochs):
        for _ in range(2):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch(scores[epoch] if scores else 0.0)
    if "min_lr" not in options:
        assert [high for _, high in seen] == pytest.approx([10 * low for low, _ in seen])
    return [low for low, _ in seen]


def test_schedules():
    assert rates() == [1] * 8
    assert rates(schedule="cosine") == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8)])
    assert rates(schedule="step", step_epochs=3, factor=0.5) == [1] * 6 + [0.5] * 2
    assert rates(schedule="step", step_epochs=1, factor=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    warm = rates(schedule="cosine", warmup_steps=2)
    assert warm[:2] == pytest.approx([0.5, 0.5 + 0.5 * math.cos(math.pi / 8)])


def test_plateau():
    better = rates([5, 4, 3, 2], schedule="plateau", factor=0.7, patience=0)
    assert better == [1] * 8
    stuck = rates([5, 5, 5, 5], schedule="plateau", factor=0.7, patience=1)
    assert stuck == pytest.approx([1] * 6 + [0.7] * 2)
    assert rates([5, 5, 5, 5], schedule="plateau", factor=0.1, patience=0, min_lr=0.5)[-1] == 0.5
    assert rates([5, math.nan, math.nan, 5], schedule="plateau", factor=0.5, patience=1)[-1] == 0.5
    warm = rates(
        [5] * 5, epochs=5, schedule="plateau", factor=0.5, patience=0, warmup_steps=6
    )  # looks at epochs from the third on
    assert warm == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 0.5, 0.5])


def test_the_plateau_follows_the_score(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(Schedule, "after_epoch", lambda self, score: seen.append(score))
    words = tiny("quantum_chemistry", "train.schedule=plateau", "train.epochs=2")
    loop.train(prepare(*words))
    assert seen[0] == 0
    assert seen[1] != 0
