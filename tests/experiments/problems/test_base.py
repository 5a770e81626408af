import pytest

from experiments.problems import base as experiment


def test_any_other_library_that_is_not_installed(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(experiment, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"'celeba' needs PIL: pip install 'mtl-balance\[experiments\]'"):
        experiment.find("celeba")
