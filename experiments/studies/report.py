"""Report of a study as Markdown: ranks and delta_m of all methods, validated advice, what the tuning chose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from balance.comparison.formats import Cell, TextTable, markdown
from experiments.studies.advice import advised, mean_regrets, regrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from experiments.studies.ranking import Ranking
    from experiments.studies.record import MethodResult, StudyRecord


def report(record: StudyRecord, ranking: Ranking, command: str) -> str:
    """Return the report of a study, with its figures by name.

    Args:
        record: The results.
        ranking: Ranks of the methods.
        command: The command that made the study.
    """
    parts = [
        "# Which method?",
        f"```bash\n{command}\n```",
        summary(record, ranking),
        "![Mean ranks with critical difference](critical_difference.png)",
        markdown(result_table(record, ranking)),
        "![delta_m of all methods with 95 % intervals](delta_m.png)",
        "![Mean rank over time of a step](cost.png)",
        "## Learning rates",
        markdown(choice_table(record)),
        "## Validated advice",
        markdown(advice_table(record)),
        markdown(diagnosis_table(record)),
        "\n".join(failures(record)),
    ]
    return "\n\n".join(parts) + "\n"


def summary(record: StudyRecord, ranking: Ranking) -> str:
    """Return the budget, the test of Friedman and the critical difference, in sentences."""
    return (
        f"{len(record.methods)} methods on {len(record.problems)} problems. Every method had {record.trials} trials on each "
        f"problem, and its best trial by validation was tested with {record.seeds} seeds. If all methods were equal, "
        f"ranks would differ so much with probability {ranking.p_value:.2g} (Friedman). Two mean ranks differ by more than "
        f"chance from a difference of {ranking.critical_difference:.1f} on (Nemenyi, level 0.05)."
    )


def result_table(record: StudyRecord, ranking: Ranking) -> TextTable:
    """Return mean rank, time, and mean delta_m with the half width of its 95 % interval on each problem, by method."""
    header = ["method", "mean rank", "time / ls", *record.problems]
    times = record.times()
    best = {name: problem.best for name, problem in record.problems.items()}
    rows = [
        [Cell(name), Cell(f"{rank:.1f}"), Cell(_number(times[name], 2))]
        + [_drop(p.methods[name], is_best=p.methods[name].mean == best[problem]) for problem, p in record.problems.items()]
        for name, rank in ranking.ranks.items()
    ]
    legend = "delta_m in % of the chosen trial, mean ± half of the 95 % interval; bold: the smallest mean of a problem."
    return TextTable(header, rows, len(rows), legend)


def _drop(result: MethodResult, *, is_best: bool) -> Cell:
    if not math.isfinite(result.mean):
        return Cell("failed")
    low, high = result.estimate.interval
    text = f"{result.mean:.1f} ± {(high - low) / 2:.1f}" if math.isfinite(high) else f"{result.mean:.1f}"
    return Cell(text, "best" if is_best else None)


def advice_table(record: StudyRecord) -> TextTable:
    """Return the regret of each rule on each problem, and its mean."""
    table = regrets(record)
    means = mean_regrets(table)
    rows = [[rule, *(_number(value, 1) for value in (means[rule], *table[rule].values()))] for rule in table]
    legend = "Regret: delta_m of the chosen method minus the smallest delta_m of all methods, in points; smaller is better."
    return TextTable(["rule", "mean regret", *record.problems], _cells(rows), len(rows), legend)


def choice_table(record: StudyRecord) -> TextTable:
    """Return the factor of the learning rate of each chosen trial, by method and problem."""
    rows = [[name, *(_rate(record, problem.methods[name]) for problem in record.problems.values())] for name in record.methods]
    legend = f"Factor of the problem's learning rate in the chosen trial, of {', '.join(f'{rate:g}' for rate in record.rates)}."
    return TextTable(["method", *record.problems], _cells(rows), len(rows), legend)


def diagnosis_table(record: StudyRecord) -> TextTable:
    """Return the numbers of the diagnosis of each problem, and the method that it advises."""
    names = list(next(iter(record.problems.values())).diagnosis)
    rows = [
        [name, *(f"{problem.diagnosis[key]:.3g}" for key in names), ", ".join(problem.findings) or "-", advised(problem) or "-"]
        for name, problem in record.problems.items()
    ]
    header = ["problem", *(key.replace("_", " ") for key in names), "findings", "advice"]
    legend = "Numbers of the diagnosis of seed 0, after 50 training steps."
    return TextTable(header, _cells(rows), len(rows), legend)


def failures(record: StudyRecord) -> Iterable[str]:
    """Yield a sentence for each method with failed runs."""
    for problem, result in record.problems.items():
        for method, of_method in result.methods.items():
            if of_method.failed:
                total = record.trials + record.seeds
                yield f"- {of_method.failed} of {total} runs of {method} on {problem} failed."


def _cells(rows: Sequence[Sequence[str]]) -> list[list[Cell]]:
    return [[Cell(text) for text in row] for row in rows]


def _rate(record: StudyRecord, result: MethodResult) -> str:
    return "-" if result.best_trial is None else f"{record.rates[result.best_trial]:g}"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
