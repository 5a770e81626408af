"""Figure of the recorded study "Which method?": mean ranks and critical difference.

python docs/figures/study_ranks.py    write docs/_static/which_method.png, which the README shows
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from experiments.studies.figures import critical_difference  # noqa: E402 - after the path is set
from experiments.studies.ranking import rank_methods  # noqa: E402
from experiments.studies.record import read_record  # noqa: E402

record = read_record(ROOT / "experiments" / "studies" / "which_method.json")
figure = critical_difference(record, rank_methods(record))
if __name__ == "__main__":
    figure.savefig(ROOT / "docs" / "_static" / "which_method.png", dpi=110, metadata={"Software": None})
