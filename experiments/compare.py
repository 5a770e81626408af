"""Table of the finished runs of an experiment, read from MLflow: mean and standard deviation over seeds, in Markdown.

python experiments/compare.py --experiment=digits --output_dir=runs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any directory

from balance.tracking import tracking_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

METHOD = ["params.loss_method", "params.gradient_method"]
NOT_SETTINGS = {"params.seed", "params.output_dir", "params.track", "params.log_every", "params.device", *METHOD}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 with a table, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--experiment", default="digits", metavar="NAME")
    parser.add_argument("--output_dir", default="runs", help="where the runs were written, unless MLFLOW_TRACKING_URI is set")
    options = parser.parse_args(arguments)
    try:
        runs = finished_runs(options.experiment, options.output_dir)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(table(runs))
    return 0


def finished_runs(experiment: str, output_dir: str) -> pd.DataFrame:
    """Finished runs, the latest for each configuration and seed.

    Raises:
        FileNotFoundError: If there is no database.
        ValueError: If there are no finished runs of the experiment.
    """
    import pandas as pd  # noqa: PLC0415 - both take seconds, which --help should not
    from mlflow import MlflowClient  # noqa: PLC0415

    uri = tracking_uri(output_dir)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise FileNotFoundError(f"There is no {uri.removeprefix('sqlite:///')}. Say where the runs are with --output_dir=...")
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(f"balance/{experiment}")
    rows: list[dict[str, Any]] = []
    token: str | None = ""
    while found is not None and token is not None:
        page = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'", page_token=token or None)
        for run in page:  # newest first
            params = {f"params.{key}": value for key, value in run.data.params.items()}
            rows.append(params | {f"metrics.{key}": value for key, value in run.data.metrics.items()})
        token = page.token or None
    if not rows:
        raise ValueError(f"There are no finished runs of 'balance/{experiment}' in {uri}.")
    runs = pd.DataFrame(rows)
    return runs.drop_duplicates(subset=["params.seed", *METHOD, *settings(runs)])


def settings(runs: pd.DataFrame) -> list[str]:
    """Columns with parameters that decide a result, beside the methods and the seed."""
    return [column for column in runs.columns if column.startswith("params.") and column not in NOT_SETTINGS]


def table(runs: pd.DataFrame) -> str:
    """One row for each configuration, best delta_m first; a setting is shown where runs of one method differ in it."""
    metrics = sorted(column for column in runs.columns if column.startswith("metrics.final/"))
    rows = []
    for method, of_method in runs.groupby(METHOD, dropna=False):
        differ = [column for column in settings(runs) if of_method[column].nunique(dropna=False) > 1]
        groups = of_method.groupby(differ, dropna=False) if differ else [((), of_method)]
        for values, group in groups:
            chosen = [f"{key.removeprefix('params.')}={value}" for key, value in zip(differ, values, strict=True)]
            label = " ".join([" + ".join(part for part in method if part not in ("None", None)), *chosen])
            rows.append((group["metrics.final/delta_m"].mean(), label, group))
    names = [name.removeprefix("metrics.final/") for name in metrics]
    lines = [f"| method | seeds | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for _, label, group in sorted(rows, key=lambda row: row[0]):
        lines.append(f"| {label} | {len(group)} | {' | '.join(spread(group[name]) for name in metrics)} |")
    return "\n".join(lines)


def spread(column: Any) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    digits = 2 if column.abs().max() >= 10 else 3
    return f"{column.mean():.{digits}f}" + (f" ± {column.std():.{digits}f}" if len(column) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
