import json

import pytest

from tests.diagnosis.problems import Quadratics, diagnose


@pytest.mark.parametrize("num_tasks", [2, 9])
def test_the_report_is_not_too_wide(num_tasks):
    targets = {f"a_task_with_quite_a_long_name_{k}": [float(k + 1), (-1.0) ** k, 1e5 * k] for k in range(num_tasks)}
    diagnosis = diagnose(Quadratics(**targets), loss_methods=None, gradient_methods=None)
    lines = str(diagnosis).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    for heading in ("LOSS", "GRADIENT LENGTH", "COSINE", "COST OF A STEP", "Recommendation"):
        assert any(line.startswith(heading) for line in lines)
    assert ("(21 more, less negative)" in str(diagnosis)) == (num_tasks == 9)


def test_columns_of_the_report_are_aligned():
    lines = str(diagnose(Quadratics(a=[2.0, 0], reconstruction=[-300.0, 4]), loss_methods=("uw",))).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("LOSS"))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    assert table[2].split() == ["a", "4", "2", "6", *table[2].split()[4:]]


def test_everything_fits_into_json():
    model = Quadratics(a=[0.0, 0], b=[0.0, 1])  # the loss and the gradient of a are zero at the start
    diagnosis = diagnose(model, loss_methods=("scaleinvls",), gradient_methods=("mgda",), steps=1)
    numbers = json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))
    assert numbers["tasks"] == ["a", "b"]
    assert numbers["start"]["relative_gradient_norm"]["a"] is None
    assert numbers["loss_prices"]["scaleinvls"]["reason"].startswith("Loss of task 'a' is 0")
    assert numbers["gradient_prices"]["mgda"]["time"] > 0
    assert numbers["recommendation"] == list(diagnosis.recommendation)
    assert set(numbers) == set(diagnosis.__dataclass_fields__)
