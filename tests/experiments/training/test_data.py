import time

import pytest
from torch.utils.data import SequentialSampler

from experiments.problems.dense.augmentation import Augmented
from experiments.training import loop
from experiments.training.data import JoinedBatchSampler, TimedBatches
from tests.experiments.short_runs import prepare


def test_training_data_get_the_number_of_the_epoch(tiny, monkeypatch):
    epochs = []
    monkeypatch.setattr(Augmented, "set_epoch", lambda self, epoch: epochs.append(epoch))
    loop.train(prepare(*tiny("nyuv2", "train.epochs=3")))
    assert epochs == [1, 2, 3]


def test_a_single_last_sample_joins_the_batch_before():
    def lists(count, size):
        batches = JoinedBatchSampler(SequentialSampler(range(count)), size, drop_last=False)
        batch_indices = list(batches)
        assert len(batches) == len(batch_indices)
        assert [i for indices in batch_indices for i in indices] == list(range(count))
        return [len(indices) for indices in batch_indices]

    assert lists(7, 3) == [3, 4]
    assert lists(8, 3) == [3, 3, 2]
    assert lists(6, 3) == [3, 3]
    assert lists(1, 3) == [1]
    assert lists(3, 1) == [1, 1, 1]


@pytest.mark.parametrize(("protocol", "sizes"), [("sound", [4]), ("paper", [3, 1])])
def test_batches_of_the_papers_are_not_joined(protocol, sizes, tiny):
    words = [f"protocol={protocol}", "train.batch_size=3", "model.name=small", "train.report_last=null"]
    assert [len(batch[0]) for batch in prepare(*tiny("nyuv2", *words)).batches] == sizes


def test_waiting_is_measured():
    def slow():
        for _ in range(3):
            time.sleep(0.02)
            yield None

    waiting = TimedBatches(slow())
    for _ in waiting:
        time.sleep(0.02)
    assert waiting.waited >= 0.06
    assert 0.2 < waiting.waiting_share() < 0.8
