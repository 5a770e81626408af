"""Sweeps in separate processes."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.experiments.sweeps.small_sweeps import markdown, recorded, start, without_costs


def descendants(pid):
    """Processes below one, by Linux's list of children."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes as Linux lists them")
def test_sigkill_half_way_then_the_same_command(tmp_path, capfd):
    words = ["--loss_method=ls,uw", "--gradient_method=none,pcgrad", "--seeds=2", "--jobs=2"]
    words += ["data.train_pairs=1024", "data.validation_pairs=50", "data.test_pairs=50", "train.epochs=4"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir(), whole.mkdir()
    process = start(killed, *words, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    ended = 0
    for line in process.stdout:
        ended += bool(re.match(r".*, seed \d: ", line))
        if ended == 10:
            break
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.time() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < end, "workers outlive their sweep"
        time.sleep(0.2)
    before = {run.info.run_id for run in recorded(killed / "runs", "attributes.status = 'FINISHED'")[0]}
    assert 10 <= len(before) < 16
    out, _ = start(killed, *words).communicate()
    assert f"{16 - len(before)} runs finished, 0 failed, {len(before)} were finished before" in out
    runs, _ = recorded(killed / "runs", "attributes.status = 'FINISHED'")
    prints = [run.data.tags["fingerprint"] for run in runs if run.data.tags["kind"] != "sweep"]
    assert len(prints) == len(set(prints)) == 16
    assert recorded(killed / "runs", "attributes.status = 'RUNNING'")[0] == []
    start(whole, *words).communicate()
    assert without_costs(markdown(killed / "runs", capfd)) == without_costs(markdown(whole / "runs", capfd))
