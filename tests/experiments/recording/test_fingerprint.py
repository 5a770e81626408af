from balance.comparison.store import EARLIER, complete
from experiments.analysis import baselines
from experiments.recording.fingerprint import common_of, fingerprint, settings_of
from tests.experiments.short_runs import DIGITS, configure


def test_fingerprints_tell_runs_apart_by_what_decides_their_result():
    def of(*arguments):
        return fingerprint(configure(*arguments))

    assert of() == of("output_dir=elsewhere", "log_every=3", "log_model=false") == of("--loss_method=ls", "train.lr=3e-3")
    others = ["--seed=1", "--loss_method=uw", "--gradient_method=mgda", "train.lr=0.01", "data.seed=1", "balancer.scale=norm"]
    assert len({of(), *map(of, others)}) == 1 + len(others)


def test_runs_from_before_an_entry_existed_stay_comparable():
    assert fingerprint(configure()) == "60bc603895098f9e"
    assert fingerprint(configure("--experiment=nyuv2", "--loss_method=uw", "--gradient_method=mgda")) == "9bce08a2396f7f23"
    config = configure()
    new = settings_of(config)
    assert complete({key: value for key, value in new.items() if key not in EARLIER}) == new
    other = settings_of(configure("train.optimizer=sgd"))
    assert complete(other) == other
    assert common_of(config) == tuple(sorted(baselines.shipped("digits").settings.items()))


def test_go4align_from_before_its_relative_step_stays_comparable():
    assert fingerprint(configure("--loss_method=go4align")) == "736b83a74ff6fd52"
    assert fingerprint(configure("--loss_method=go4align+dwa")) == "511cd898fe01086a"
    assert fingerprint(configure("--loss_method=go4align", "loss.relative_step=true")) != "736b83a74ff6fd52"
    for method, key in (("go4align", "loss.relative_step"), ("go4align+dwa", "loss.go4align.relative_step")):
        new = settings_of(configure(f"--loss_method={method}")) | {"loss_method": method}
        assert complete({name: value for name, value in new.items() if name != key}) == new


def test_precision_and_optimizer_decide_a_result():
    words = ["train.precision=bf16", "train.optimizer=adamw", "train.optimizer=sgd", "optimizer.eps=1e-7"]
    assert len({fingerprint(configure()), *(fingerprint(configure(word)) for word in words)}) == 5


def test_the_engine_is_not_a_setting_of_the_result(tmp_path):
    """Runs that differ only in the computation of gradients are one row of a table."""
    words = ["--gradient_method=mgda", *DIGITS]
    configs = [
        configure(*words, *more)
        for more in ([], ["balancer.engine=loop", "balancer.memory=jacobian"], ["balancer.measure=['*']"])
    ]
    prints = [fingerprint(config) for config in configs]
    assert prints[0] == prints[1] != prints[2]


def test_what_does_not_decide_a_result():
    def of(*words):
        return fingerprint(configure("--experiment=nyuv2", *words))

    same = ["train.eval_batch_size=3", "train.num_workers=2", "data.cache=elsewhere"]
    assert {of(word) for word in same} == {of()}
    assert of("data.path=a") == of("data.path=b") != of()
    papers = [of("protocol=paper", f"train.eval_batch_size={size}") for size in (2, 3)]
    assert papers[0] != papers[1]  # averages over batches
