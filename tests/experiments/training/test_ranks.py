"""Runs on several processes: every problem trains, and digits ends like on one process."""

from tests.distributed.processes import run_on_ranks
from tests.experiments.training.on_ranks import assert_equal, train_all


def test_two_processes_train_digits_like_one(tiny, tmp_path):
    """Of 101 samples the ranks have 12 and 11, or 3 and 2."""
    methods = (["--loss_method=rlw", "--gradient_method=pcgrad"], ["--loss_method=famo"], ["train.precision=fp16"])
    words = ["data.train_pairs=97", "train.batch_size=23", "train.epochs=2", "train.max_norm=1"]
    cases = [tiny("digits", *method, *words) for method in methods]
    one = train_all(0, cases)
    two = run_on_ranks(train_all, 2, tmp_path, cases)
    assert_equal(two[0], two[1], rtol=0, atol=0)
    assert [result["final"] for result in two[0]] == [result["final"] for result in two[1]]
    assert_equal(two[0][:2], one[:2], rtol=1e-3, atol=1e-4)  # Adam turns rounding into up to a step of 1e-3
    assert_equal(two[0][2:], one[2:], rtol=1e-1, atol=1e-3)
    assert len([*(tmp_path / "runs/digits").iterdir()]) == 2 * len(cases)
