"""Figure of the recorded study "Which method?": delta_m with intervals on each problem."""

from __future__ import annotations

from pathlib import Path

from experiments.studies.figures import drops
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record

ROOT = Path(__file__).resolve().parents[2]
record = read_record(ROOT / "experiments" / "studies" / "which_method.json")
drops(record, rank_methods(record))
