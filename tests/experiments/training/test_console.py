import torch

from balance import Report
from experiments.training.console import losses_line, metrics_line


def test_lines_of_many_tasks_have_means_and_extremes():
    metrics = {f"t{k}/f1": k / 100 for k in range(40)}
    assert metrics_line(metrics) == "f1 0.1950 (0.0000 to 0.3900)"
    ones = torch.ones(13)
    report = Report(tuple(f"t{k}" for k in range(13)), ones, ones, ones, ones, None)
    assert losses_line(report) == "losses 1 (1 to 1)"
