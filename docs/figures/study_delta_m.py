"""Figure of the recorded study "Which method?": delta_m with intervals on each problem."""

from __future__ import annotations

from experiments.studies.figures import drops
from experiments.studies.ranking import rank_methods
from experiments.studies.record import read_record

record = read_record()
drops(record, rank_methods(record))
