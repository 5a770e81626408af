from experiments.sweeps.console import result_line
from experiments.sweeps.plan import baseline_jobs
from experiments.sweeps.worker import Outcome


def test_result_line_of_a_baseline_has_its_own_task_only():
    jobs = baseline_jobs(["train.epochs=1"], [0])
    outcome = Outcome({"left/accuracy": 0.5, "right/accuracy": 0.1, "sum/mae": 2.0, "delta_m": 3.0}, None, 4.0)
    assert [result_line(job, outcome) for job in jobs[:2]] == [
        "stl left, seed 0: left/accuracy 0.5000 (4 s)",
        "stl right, seed 0: right/accuracy 0.1000 (4 s)",
    ]
