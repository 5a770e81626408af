"""Figure of the recorded study "Which method?": mean rank over the time of a step."""

from __future__ import annotations

from experiments.studies.figures import cost
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record

record = read_record()
cost(record, rank_methods(record))
