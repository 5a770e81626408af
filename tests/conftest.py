import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, next to other tests on the same cores

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))  # nothing is written beside the sources
settings.register_profile("dev", max_examples=20, deadline=None, database=None)
settings.register_profile("ci", max_examples=20, deadline=None, database=None, derandomize=True)
settings.register_profile(
    "thorough", max_examples=1000, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "mutation", max_examples=15, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    return json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An empty database of MLflow, to be copied: its creation takes seconds."""
    from balance.tracking import connect

    folder = tmp_path_factory.mktemp("empty")
    connect("empty", folder)
    return folder / "mlflow.db"
