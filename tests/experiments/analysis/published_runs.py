"""Published tables, and recorded runs whose metrics are known multiples of the published ones."""

from balance.comparison.recorded_run import RecordedRun
from balance.comparison.run_table import tabulate
from experiments.analysis import published_tables

SCENES = {"data.source": "scenes", "train.epochs": "12"}
REAL = {"data.source": "files", "data.protocol": "sound", "train.epochs": "12"}
NYUV2 = published_tables.load("nyuv2")
STL = {name: printed.value for name, printed in NYUV2.in_experiment_units(NYUV2.single_task).items()}


def compared_runs(table=NYUV2, settings=REAL, factors=(1.0, 1.1)):
    """Compare runs of three pairs of methods: the metrics of single-task networks, worse by a factor for each seed."""
    single_task = {name: printed.value for name, printed in table.in_experiment_units(table.single_task).items()}
    runs = []
    for loss, gradient in (("famo", None), ("ls", "pcgrad"), ("famo", "pcgrad")):
        for seed, factor in enumerate(factors):
            metrics = {name: v / factor if name in table.higher_is_better else v * factor for name, v in single_task.items()}
            runs.append(RecordedRun(f"{loss}{gradient}{seed}", loss, gradient, seed, settings, metrics))
    return tabulate(
        runs,
        experiment=table.experiment,
        higher_is_better=table.higher_is_better,
        baselines=single_task,
        baselines_from="a file",
    )
