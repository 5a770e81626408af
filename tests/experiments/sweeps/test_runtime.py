from experiments.sweeps import runtime
from tests.experiments.short_runs import configure
from tests.experiments.sweeps.small_sweeps import TINY


def test_an_estimate_follows_the_number_of_epochs(tmp_path):
    def seconds(epochs):
        config = configure(*TINY[:3], f"train.epochs={epochs}")
        return runtime.estimate_run(config)

    assert 10 < seconds(1000) / seconds(10) < 1000
