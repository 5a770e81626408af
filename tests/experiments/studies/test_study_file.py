import itertools

import pytest
import yaml

from balance import gradient_balancers, loss_balancers
from experiments.problems import base as problems
from experiments.studies.study_file import SHIPPED, read_study, small_version, with_problems
from experiments.studies.trials import FACTOR, random_weights, trials, with_seed

STUDY = {"methods": {"ls": {}, "uw": {"loss_method": "uw"}}, "problems": {"digits": {"experiment": "digits"}}}
SEEDS = ("ls", "scaleinvls", "rlw", "dwa", "uw", "igbv1", "igbv2", "famo", "go4align")
GRADIENT = ("mgda", "pcgrad", "cagrad", "imtl", "nashmtl", "graddrop", "upgrad", "fairgrad", "aligned_mtl", "config")


def study(tmp_path, **changes):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes))
    return read_study(file)


def test_shipped_study_has_all_methods_and_all_problems_with_data():
    shipped = read_study(SHIPPED)
    pairs = {(method.loss_method, method.gradient_method) for method in shipped.methods.values()}
    assert {(name, None) for name in (*SEEDS, "constant")} <= pairs
    assert {("ls", name) for name in GRADIENT} <= pairs
    assert set(SEEDS) <= set(loss_balancers.names())
    assert set(GRADIENT) <= set(gradient_balancers.names())
    without = {"regression100", "toy", "cityscapes", "metaworld"}  # the reasons are in the file
    assert {problem.experiment for problem in shipped.problems.values()} == set(problems.names()) - without
    text = SHIPPED.read_text()
    assert all(name in text for name in without)
    assert shipped.seeds == 5


@pytest.mark.parametrize("name", ["ls", "constant", "go4align", "cagrad"])
@pytest.mark.parametrize("problem", list(read_study(SHIPPED).problems))
def test_every_method_has_the_same_number_of_different_trials(name, problem):
    shipped = read_study(SHIPPED)
    jobs = trials(shipped, name, shipped.problems[problem], ("output_dir=none",))
    assert len({job.fingerprint for job in jobs}) == len(jobs) == len(shipped.rates)
    default = trials(shipped, "ls", shipped.problems[problem], ("output_dir=none",))
    assert [job.config.train.lr for job in jobs] == [job.config.train.lr for job in default]
    assert all(job.config.seed == shipped.tuning_seed >= shipped.seeds for job in jobs)
    assert with_seed(jobs[1], 3).config.seed == 3
    assert with_seed(jobs[1], shipped.tuning_seed).fingerprint == jobs[1].fingerprint


def test_trials_take_the_searched_values_in_turn():
    shipped = read_study(SHIPPED)
    jobs = trials(shipped, "cagrad", shipped.problems["two digits"], ("output_dir=none",))
    assert [job.config.gradient.c for job in jobs] == [0.4, 0.2, 0.8, 0.4]
    famo = trials(shipped, "famo", shipped.problems["digits"], ("output_dir=none",))
    assert [job.config.loss.lr for job in famo] == [None, 0.1, None, 0.1]


def test_random_weights_are_positive_with_mean_one_and_differ_between_trials():
    drawn = [random_weights(4, trial) for trial in range(6)]
    for weights in drawn:
        assert min(weights) > 0
        assert sum(weights) / 4 == pytest.approx(1, rel=1e-3)
        assert max(weights) / min(weights) <= FACTOR * 1.01
    assert all(a != b for a, b in itertools.combinations(drawn, 2))
    assert drawn[0] == random_weights(4, 0)


def test_small_version_and_chosen_problems():
    shipped = read_study(SHIPPED)
    small = small_version(shipped)
    assert small.seeds < shipped.seeds
    assert len(small.rates) < len(shipped.rates)
    assert small.methods == shipped.methods
    assert list(with_problems(shipped, ["faces", "digits"]).problems) == ["faces", "digits"]
    with pytest.raises(ValueError, match=r"problem of the study 'digit'.*'digits'"):
        with_problems(shipped, ["digit"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "key of the file 'method'"),
        ({"methods": {"ls": {}, "uw": {"los_method": "uw"}}}, "key of methods 'uw' 'los_method'"),
        ({"problems": {"digits": {"metric": []}}}, "key of problems 'digits' 'metric'"),
        ({"methods": {"ls": {}}}, "1 methods and 1 problems"),
        ({"problems": {}}, "2 methods and 0 problems"),
        ({"methods": {"uw": {}, "dwa": {}}}, "methods must have ls"),
        ({"rates": []}, "at least one rate"),
        ({"rates": [0.0]}, "must be positive"),
        ({"seeds": 0}, "must be positive"),
        ({"seeds": "many"}, "seeds"),
        ({"tuning_seed": 2}, "tuning_seed must be at least seeds=5"),
        ({"problems": {"digits": {"reference": "sl"}}}, "reference 'sl'"),
        ({"problems": [1]}, "study.yaml must be a YAML file"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"study\.yaml must be a YAML file with a study") as caught:
        study(tmp_path, **changes)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml"):
        read_study(tmp_path / "none.yaml")
