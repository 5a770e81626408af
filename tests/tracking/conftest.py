import shutil

import pytest


@pytest.fixture
def folder(empty_database, tmp_path):
    """A folder with an empty database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path
