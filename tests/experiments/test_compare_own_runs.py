"""The command that compares recorded runs, for runs of a training loop that no problem describes."""

import json
import shutil

import pytest

from balance.tracking import Tracker
from experiments import compare


@pytest.fixture(scope="module")
def folder(empty_database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(empty_database, folder / "mlflow.db")
    for source in ("a", "b"):
        for method, accuracy in (("ls", 0.5), ("mine", 0.75)):
            options = {"loss_method": method, "seed": 0, "params": {"data.source": source}}
            with Tracker("my-model", folder, higher_is_better=("digit/accuracy",), **options) as tracker:
                tracker.log_final({"digit/accuracy": accuracy}, 1)
    with Tracker("other", folder, loss_method="ls", seed=0, higher_is_better=()) as tracker:
        tracker.log_final({"digit/error": 1.0}, 1)
    return folder


def printed(capfd, folder, *words):
    capfd.readouterr()
    assert compare.main(["--experiment=my-model", f"--output_dir={folder}", "--table_only", "--format=json", *words]) == 0
    return json.loads(capfd.readouterr().out)


def refused(capfd, *words):
    with pytest.raises(SystemExit) as caught:
        compare.main(list(words))
    assert caught.value.code == 2
    return capfd.readouterr().err


def test_own_runs_are_compared_by_name(folder, capfd):
    made = printed(capfd, folder, "data.source=a")
    assert [row["method"] for row in made["rows"]] == ["mine", "ls"]
    assert made["metrics"] == [{"name": "digit/accuracy", "higher_is_better": True}]
    assert made["baselines"] is None
    per = printed(capfd, folder, "--per=data.source")
    assert {value: table["rows"][0]["method"] for value, table in per["comparisons"].items()} == {"a": "mine", "b": "mine"}


def test_baselines_of_own_runs_from_a_file(folder, capfd, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("metrics: {digit/accuracy: {mean: 1.0}}", encoding="utf-8")
    drops = {
        row["method"]: row["delta_m"]["mean"] for row in printed(capfd, folder, "data.source=a", f"--baselines={file}")["rows"]
    }
    assert drops == pytest.approx({"mine": 25, "ls": 50})


def test_mistakes_with_own_runs(folder, capfd):
    assert "Select one of them, or make a table of each with compare.py --per=data.source" in refused(
        capfd, "--experiment=my-model", f"--output_dir={folder}"
    )
    error = refused(capfd, "--experiment=my-mode", f"--output_dir={folder}")
    assert "Unknown experiment 'my-mode'. Did you mean 'my-model'?" in error
    assert "digits" in error
    assert "mlflow.db: my-model, other." in " ".join(error.split())


def test_unknown_experiment_without_a_store(capfd, tmp_path):
    error = refused(capfd, "--experiment=my-model", f"--output_dir={tmp_path}")
    assert "Unknown experiment 'my-model'" in error
    assert "Recorded in" in error
    assert "none." in error
    assert list(tmp_path.iterdir()) == []
