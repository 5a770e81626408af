"""The methods auto of the trainer: a diagnosis chooses the pair, and the run is a run of that pair."""

import pytest

from balance.diagnosis.advice import Advice
from experiments import baselines, diagnose, sweep, trainer
from experiments.config.layers import configure
from experiments.recording.fingerprint import fingerprint
from experiments.training import automatic, ranks
from experiments.training.automatic import configure_automatic
from tests.experiments.short_runs import DIGITS, TINY, runs_in, train

AUTO = ["--loss_method=auto", "--gradient_method=auto"]
WORDS = [*AUTO, "--seed=3", *TINY["digits"], "train.epochs=1", "log_model=false"]


def overrides(*words):
    return [word.removeprefix("--") for word in words]


def test_run_equals_the_run_of_the_chosen_pair_and_records_the_reason(tmp_path, capsys):
    assert trainer.main([*WORDS, f"--output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    (run,), _ = runs_in(tmp_path)
    config = configure_automatic(overrides(*WORDS))
    pair = [f"loss_method={config.loss_method}", f"gradient_method={config.gradient_method}"]
    assert (run.data.params["loss_method"], run.data.params["gradient_method"]) == (
        config.loss_method,
        str(config.gradient_method),
    )
    assert run.data.params["chosen_by"] == config.chosen_by
    assert "sum" in config.chosen_by  # the task whose loss is hundreds of times as large
    assert "auto chose" in printed
    assert config.chosen_by.split(". ")[0] in " ".join(printed.split())
    named = train(*overrides(*WORDS), *pair, "track=false", f"output_dir={tmp_path / 'named'}")
    assert {name: run.data.metrics[f"final/{name}"] for name in named} == named
    assert fingerprint(config) == fingerprint(configure([*overrides(*WORDS), *pair]))


def test_methods_without_auto_are_left_alone():
    words = ["loss_method=uw", "gradient_method=pcgrad", *DIGITS]
    assert configure_automatic(words) == configure(words)
    assert configure_automatic(words).chosen_by is None


def test_options_of_the_chosen_method_can_be_set(monkeypatch):
    advice = Advice("famo", None, "because")
    monkeypatch.setattr(automatic, "advise_network", lambda config: advice)
    config = configure_automatic([*overrides(*WORDS), "loss.gamma=0.5"])
    assert (config.loss_method, config.gradient_method, config.loss.gamma) == ("famo", None, 0.5)
    with pytest.raises(ValueError, match="gama"):
        configure_automatic([*overrides(*WORDS), "loss.gama=0.5"])


def test_several_ranks_are_refused(monkeypatch):
    """Their diagnoses would see different batches, and wait for each other."""
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(ValueError, match=r"must be names with torchrun.* but got auto with 2 processes"):
        configure_automatic(overrides(*WORDS))


@pytest.mark.parametrize("words", [["--loss_method=auto"], ["--gradient_method=auto"], [*AUTO, "--gradient_method=pcgrad"]])
def test_one_automatic_method_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        trainer.main(words)
    assert "must both be auto" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [sweep, baselines, diagnose])
def test_other_commands_take_names_only(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["loss_method=auto", "--output=file.yaml"] if command is baselines else ["loss_method=auto"]
    with pytest.raises(SystemExit):
        command.main(["--loss_method=auto"] if command is sweep else words)
    assert "which only trainer.py starts a run" in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
