import io
import re

from rich.console import Console

from experiments.training import loop
from tests.experiments.short_runs import prepare


def test_classes_that_do_not_occur_are_printed(tiny):
    run = prepare(*tiny("nyuv2"))
    run = run._replace(console=Console(width=200, record=True, file=io.StringIO()))
    loop.train(run)
    (line,) = [line for line in run.console.export_text().splitlines() if "segmentation/miou is" in line]
    assert re.fullmatch(r"segmentation/miou is a mean over \d+ of 13 classes; the others do not occur\.", line.strip())
