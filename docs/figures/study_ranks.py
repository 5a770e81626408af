"""Figure of the recorded study "Which method?": mean ranks and critical difference."""

from __future__ import annotations

from experiments.studies.figures import critical_difference
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record

record = read_record()
critical_difference(record, rank_methods(record))
