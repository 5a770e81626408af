import json
import math

import numpy as np
import pytest

from experiments.studies.record import StudyRecord, read_record
from tests.experiments.studies.synthetic import THREE, problem, record


def test_record_survives_a_file(tmp_path):
    failed = record(problem({"ls": [1.0, math.inf], "uw": [], "nashmtl": [2.0, 3.0]}), *THREE.problems.values())
    failed.write(tmp_path / "record.json")
    again = read_record(tmp_path / "record.json")
    assert again == failed
    assert again.problems["p0"].methods["ls"].mean == math.inf  # a seed that diverged is not left out of the mean
    assert again.problems["p0"].methods["uw"].mean == math.inf


def test_table_and_times_relative_to_equal_weights():
    assert THREE.methods == ["ls", "uw", "nashmtl"]
    np.testing.assert_array_equal(THREE.table(), [[11, 5, 1], [0, 3, 8], [20, 2, 1]])
    assert THREE.times() == pytest.approx({"ls": 1, "uw": 1, "nashmtl": 2})


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"seeds": 1, "rates": [1], "problems": {"a": {"methods": 3}}})])
def test_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=r"record\.json must be a record that experiments/study\.py wrote"):
        read_record(tmp_path / "record.json")


def test_missing_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FileNotFoundError"):
        read_record(tmp_path / "none.json")


def test_methods_without_a_time_have_none():
    methods = {name: problem({"ls": [1.0], "uw": [2.0]}).methods[name] for name in ("ls", "uw")}
    methods["uw"] = methods["uw"].__class__("uw", None, {0: 1.0})
    of_problem = problem({"ls": [1.0]}).__class__("digits", (), "", methods)
    assert math.isnan(StudyRecord(1, (1.0,), {"p": of_problem}).times()["uw"])
