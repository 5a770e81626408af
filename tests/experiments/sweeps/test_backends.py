"""Sweeps on clusters of Ray and Dask, started for the test."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.experiments.sweeps.small_sweeps import TINY, recorded, start


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_on_a_dask_cluster(tmp_path, free_port):
    pytest.importorskip("distributed", reason="Dask is not installed (pip install -e . --group dask)")
    address = f"tcp://127.0.0.1:{free_port}"
    programs = [
        ["scheduler", "--host", "127.0.0.1", "--port", str(free_port), "--no-dashboard"],
        ["worker", address, "--nthreads", "1", "--nworkers", "2", "--no-dashboard"],
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *words], cwd=elsewhere, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for words in programs
    ]
    try:
        for _ in range(30):  # until the workers are there
            time.sleep(1)
            out, _ = start(tmp_path, "--loss_method=ls,uw", "--backend=dask", f"--cluster={address}", *TINY).communicate()
            if "has no workers" not in out and "does not answer" not in out:
                break
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=30)
    assert "6 runs finished, 0 failed" in out
    assert len(recorded(tmp_path / "runs", "attributes.status = 'FINISHED'")[0]) == 7


@pytest.mark.slow
def test_on_a_ray_cluster(tmp_path, free_port):
    pytest.importorskip("ray", reason="Ray is not installed (pip install -e . --group ray)")
    ray = [str(Path(sys.executable).parent / "ray")]
    short = tempfile.mkdtemp(prefix="ray-")  # its sockets need a short path
    head = ["start", "--head", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--port={free_port}"]
    subprocess.run([*ray, *head, f"--temp-dir={short}"], check=True, capture_output=True)
    try:
        words = ["--loss_method=ls,uw", "--backend=ray", f"--cluster=127.0.0.1:{free_port}", *TINY]
        out, _ = start(tmp_path, *words).communicate()
    finally:
        subprocess.run([*ray, "stop"], check=True, capture_output=True)
        shutil.rmtree(short, ignore_errors=True)
    assert "6 runs finished, 0 failed" in out
    assert len(recorded(tmp_path / "runs", "attributes.status = 'FINISHED'")[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_that_does_not_exist(backend, tmp_path, free_port):
    pytest.importorskip("ray" if backend == "ray" else "distributed", reason="not installed")
    address = f"127.0.0.1:{free_port}" if backend == "ray" else f"tcp://127.0.0.1:{free_port}"
    process = start(tmp_path, f"--backend={backend}", f"--cluster={address}", *TINY)
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "does not answer" in out
    assert "Traceback" not in out
