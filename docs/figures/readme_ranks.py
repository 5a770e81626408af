"""Write docs/_static/which_method.png, the mean ranks of the recorded study, which the README shows.

python docs/figures/readme_ranks.py
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
sys.path.append(str(DOCS.parent))

from experiments.studies.figures import critical_difference  # noqa: E402 - after the path is set
from experiments.studies.ranking import rank_methods  # noqa: E402
from experiments.studies.record import read_record  # noqa: E402

record = read_record()
figure = critical_difference(record, rank_methods(record))
figure.savefig(DOCS / "_static" / "which_method.png", dpi=110, metadata={"Software": None})
