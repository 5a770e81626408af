from balance.comparison.single_task import most_common_settings, single_task_means
from tests.comparison.recorded import run


def alone(task, seed, settings=None, **metrics):
    return run("stl", seed=seed, settings={"loss.main_task": str(task)} | (settings or {}), **metrics)


def test_each_metric_is_of_the_network_of_its_task():
    runs = [alone(0, 0, error=1.0, accuracy=0.1), alone(0, 1, error=3.0, accuracy=0.1), alone(1, 0, error=9.0, accuracy=0.7)]
    common = runs[0].common
    assert single_task_means(runs, common, ("a", "b")) == {"a/error": 2.0, "b/accuracy": 0.7}
    assert single_task_means(runs[:2], common, ("a", "b")) == {}
    assert single_task_means(runs, (("train.lr", "other"),), ("a", "b")) == {}


def test_the_settings_of_most_runs_come_first():
    slow = {"train.lr": "0.01"}
    assert most_common_settings([run(settings=slow), run(seed=1), run(seed=2)])[0] == run().common
    assert ("balancer.scale", "paper") not in run().common
