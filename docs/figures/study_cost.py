"""Figure of the recorded study "Which method?": mean rank over the time of a step."""

from __future__ import annotations

from pathlib import Path

from experiments.studies.figures import cost
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record

ROOT = Path(__file__).resolve().parents[2]
record = read_record(ROOT / "experiments" / "studies" / "which_method.json")
cost(record, rank_methods(record))
