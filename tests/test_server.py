"""The commands with a tracking server as teams have it: MLflow's server, a PostgreSQL store and a folder for artifacts."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

ROOT = Path(__file__).parents[1]
TINY = ["data.train_pairs=128", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=1"]
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(command, answers, **options):
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        for _ in range(240):
            if answers():
                break
            assert started.poll() is None, f"{command[0]} has ended"
            time.sleep(0.5)
        else:
            pytest.fail(f"{command[0]} does not answer")
        yield
    finally:
        os.killpg(started.pid, 15)
        started.wait(timeout=30)


@pytest.fixture(scope="module")
def postgresql():
    """A database for this test only. PostgreSQL refuses to run as root, so it then runs as a separate user."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install -e . --group server)")
    as_user = {}
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if os.geteuid() == 0:
        as_user = {"user": "postgres", "group": "postgres"}
        shutil.chown(folder, "postgres", "postgres")
    port, here = free_port(), PROGRAMS[-1].parent
    options = {"cwd": folder, **as_user}
    subprocess.run(
        [here / "initdb", "-D", folder / "data", "-U", "mlflow", "-A", "trust"], check=True, capture_output=True, **options
    )
    server = [here / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1"]
    ready = [here / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-q"]
    with process(server, lambda: subprocess.run(ready, check=False).returncode == 0, **options):
        subprocess.run([here / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], check=True)
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/mlflow"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(postgresql, tmp_path_factory):
    port, artifacts = free_port(), tmp_path_factory.mktemp("artifacts")
    address = f"http://127.0.0.1:{port}"

    def answers():
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2) as page:
                return page.status == 200
        except OSError:
            return False

    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", postgresql, "--host", "127.0.0.1"]
    command += ["--artifacts-destination", str(artifacts), "--port", str(port), "--workers", "2"]
    with process(command, answers, cwd=artifacts):
        yield address, artifacts


def command(script, *words, folder, address):
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *words],
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": address},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_a_sweep_and_its_report_on_a_server_with_postgresql(server, tmp_path):
    address, artifacts = server
    words = ["--loss_method=ls,uw", "--gradient_method=none,pcgrad", "--seeds=2", "--jobs=2", *TINY]
    swept = command("sweep.py", *words, folder=tmp_path, address=address).stdout
    assert "16 runs finished, 0 failed, 0 were finished before" in swept
    again = command("sweep.py", *words, folder=tmp_path, address=address).stdout
    assert "0 runs to do, 16 are finished already" in again
    table = command("compare.py", "--format=markdown", folder=tmp_path, address=address).stdout
    assert all(
        f"| {label} |" in table.replace("*", "").replace("≈ ", "") for label in ("ls", "uw", "ls + pcgrad", "uw + pcgrad")
    )
    assert not list(tmp_path.rglob("mlflow.db"))

    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("balance/digits").experiment_id
    (parent,) = client.search_runs([experiment], "tags.kind = 'sweep'")
    assert parent.info.status == "FINISHED"
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 16
    page = download_artifacts(run_id=parent.info.run_id, artifact_path="comparison/report.html", tracking_uri=address)
    assert "ls + pcgrad" in Path(page).read_text(encoding="utf-8")
    assert list(artifacts.rglob("report.html"))


@pytest.mark.slow
def test_a_server_that_is_away_is_told_at_once(server, tmp_path):
    missing = f"http://127.0.0.1:{free_port()}"
    start = time.perf_counter()
    for script in ("trainer.py", "sweep.py", "compare.py"):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            command(script, folder=tmp_path, address=missing)
        assert caught.value.returncode == 2
        assert f"MLflow at {missing} cannot be used" in caught.value.stderr
        assert "Traceback" not in caught.value.stderr
    assert time.perf_counter() - start < 120
