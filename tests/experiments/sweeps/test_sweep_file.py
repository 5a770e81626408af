"""Sweeps in YAML files: form of the file, planned runs, and names of configurations in tables."""

from pathlib import Path

import pytest
import yaml

from balance.comparison.store import Store
from experiments import sweep
from experiments.problems import base as experiments
from experiments.sweeps import runtime
from experiments.sweeps.plan import plan
from experiments.sweeps.sweep_file import read_sweep_file
from tests.experiments.sweeps.small_sweeps import TINY

COMPARISON = experiments.FOLDER / "multimnist" / "comparison.yaml"
SMALL = {
    "experiment": "digits",
    "seeds": 2,
    "overrides": TINY,
    "grid": {"data.noise": [0, 0.5]},
    "configurations": {
        "plain": {},
        "surgery": {"gradient_method": "pcgrad"},
        "uncertain": {"loss_method": "uw", "overrides": ["train.lr=0.01"]},
    },
}


@pytest.fixture
def small(tmp_path):
    """A small sweep in a file, with changes."""

    def write(**changes):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(SMALL | changes), encoding="utf-8")
        return file

    return write


def planned(file, folder, *words):
    options = sweep.build_parser().parse_intermixed_args([f"--file={file}", f"--output_dir={folder}", *words])
    return plan(sweep.read_sweep(options), create=False)


def refused(capsys, *words):
    with pytest.raises(SystemExit, match="2"):
        sweep.main(list(words))
    return capsys.readouterr().err


def test_a_file_is_read(small):
    content = read_sweep_file(small())
    assert (content.experiment, content.seeds, content.grid) == ("digits", "2", {"data.noise": [0, 0.5]})
    assert list(content.configurations) == ["plain", "surgery", "uncertain"]
    assert content.configurations["uncertain"].overrides == ["train.lr=0.01"]


def test_plan_has_every_configuration_cell_and_seed(small, tmp_path):
    jobs = [job for job in planned(small(), tmp_path) if not job.is_baseline]
    assert len({job.fingerprint for job in jobs}) == len(jobs) == 3 * 2 * 2
    assert {(job.name, job.config.data.noise, job.config.seed) for job in jobs} == {
        (name, noise, seed) for name in SMALL["configurations"] for noise in (0, 0.5) for seed in (0, 1)
    }
    methods = {job.name: (job.config.loss_method, job.config.gradient_method, job.config.train.lr) for job in jobs}
    rate = methods["plain"][2]
    assert methods == {"plain": ("ls", None, rate), "surgery": ("ls", "pcgrad", rate), "uncertain": ("uw", None, 0.01)}
    assert {job.config.train.epochs for job in jobs} == {1}
    assert jobs[0].label == "plain data.noise=0"


def test_baselines_have_the_settings_of_each_cell_but_of_no_configuration(small, tmp_path):
    baselines = [job for job in planned(small(), tmp_path) if job.is_baseline]
    assert len(baselines) == 4 * 2 * 2
    assert {job.config.data.noise for job in baselines} == {0, 0.5}
    assert 0.01 not in {job.config.train.lr for job in baselines}
    assert [job for job in planned(small(), tmp_path, "--no_baselines") if job.is_baseline] == []


def test_the_command_line_changes_seeds_and_common_overrides(small, tmp_path):
    jobs = planned(small(), tmp_path, "--seeds=7,", "train.epochs=3")
    assert {job.config.seed for job in jobs} == {7}
    assert {job.config.train.epochs for job in jobs} == {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "Unknown key of the file 'seed'. Did you mean 'seeds'?"),
        ({"configurations": {"a": {"loss": "uw"}}}, "Unknown key of configuration 'a' 'loss'"),
        ({"configurations": {"a": None}}, "configuration 'a' must have keys and values, but got None"),
        ({"configurations": {}}, "must have at least one configuration"),
        ({"grid": {"data.noise": []}}, "at least one value for each key"),
        ({"grid": {"data.noise": 3}}, "does not fit 'grid.data.noise'"),
        ({"configurations": {"a": {}, "b": {}}}, "Configurations must differ, but 'a' and 'b' are equal"),
        ({"configurations": {"a": {"loss_method": "lss"}}}, "Unknown loss balancer 'lss'"),
        ({"overrides": ["train.epoch=1"]}, "Did you mean 'train.epochs'?"),
        ({"experiment": "digit"}, "Did you mean 'digits'?"),
    ],
)
def test_mistakes_in_a_file(small, tmp_path, capsys, changes, message):
    assert message in refused(capsys, f"--file={small(**changes)}", f"--output_dir={tmp_path}/runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "3"])
def test_a_file_of_another_form(tmp_path, capsys, text):
    file = tmp_path / "other.yaml"
    file.write_text(text, encoding="utf-8")
    assert "other.yaml must be a YAML file with a sweep" in refused(capsys, f"--file={file}")
    assert "missing.yaml must be a YAML file" in refused(capsys, f"--file={tmp_path}/missing.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experiment=digits"], "--experiment must not be given with --file"),
        (["--loss_method=uw"], "--loss_method must not be given with --file"),
        (["data.noise=0.1"], "data.noise must be set by the sweep file only"),
        (["train.lr=1"], "train.lr must be set by the sweep file only"),
        (["experiment=toy"], "experiment must be set by the sweep file only"),
        (["seed=1"], "Use --seeds"),
    ],
)
def test_flags_and_overrides_that_contradict_a_file(small, capsys, words, message):
    assert message in refused(capsys, f"--file={small()}", *words)


def test_the_published_comparison_of_two_digits(tmp_path):
    """Five configurations with and without imbalance, and single-task networks for both."""
    jobs = planned(COMPARISON, tmp_path, "--seeds=1")
    assert {(job.name, job.config.data.imbalance) for job in jobs if not job.is_baseline} == {
        (name, imbalance)
        for name in ("summed-loss", "pcgrad", "normalized-splitter", "normalized-project3", "project3")
        for imbalance in (1, 1000)
    }
    assert {(job.tasks, job.config.data.imbalance) for job in jobs if job.is_baseline} == {
        ((task,), imbalance) for task in ("left", "right") for imbalance in (1, 1000)
    }
    model = {job.name: (job.config.model.shared, job.config.model.splitter) for job in jobs if job.name}
    assert model["pcgrad"] == ("everything", None)
    assert model["normalized-project3"] == ("trunk", "normalized-project3")


@pytest.mark.slow
def test_imbalance_ruins_the_small_loss_unless_a_splitter_normalizes(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "BUDGET", 0.01)
    content = yaml.safe_load(COMPARISON.read_text(encoding="utf-8"))
    content |= {"seeds": 1, "grid": {"data.imbalance": [1000]}}
    content["configurations"] = {name: content["configurations"][name] for name in ("summed-loss", "normalized-splitter")}
    file = Path(tmp_path / "two.yaml")
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    words = [f"--file={file}", "--no_baselines", "--jobs=1", "train.epochs=3", f"--output_dir={tmp_path}"]
    assert sweep.main(words) == 0
    accuracies = {run.configuration: run.metrics for run in Store("multimnist", str(tmp_path)).runs()}
    assert accuracies["summed-loss"]["left/accuracy"] < 0.6
    assert accuracies["normalized-splitter"]["left/accuracy"] > 0.9
    assert min(metrics["right/accuracy"] for metrics in accuracies.values()) > 0.9
