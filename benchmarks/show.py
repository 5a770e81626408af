"""Tables and figures of recorded results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path


PEER = "torchjd "  # prefix of TorchJD's rows

SHOWN = {  # label, colour, marker and line by variant
    "torchjd mtl_backward + jac_to_grad": ("TorchJD 0.18, mtl_backward", "#999999", "s", "--"),
    "torchjd autogram": ("TorchJD 0.18, autogram", "#999999", "^", ":"),
    "textbook loop": ("textbook loop", "#000000", "x", "--"),
    "parameters": ("balance, parameters", "#0072B2", "o", "-"),
    "measure=last quarter": ("balance, measure=last quarter", "#56B4E9", "D", "-"),
    "features": ("balance, features", "#D55E00", "o", "-"),
    "splitter: imtl": ("balance, Splitter", "#E69F00", "v", "-"),
}

COLOURS = ("#000000", "#999999", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#8B4513")

TABLE = {  # labels by variant
    "losses.sum().backward()": "`losses.sum().backward()`",
    "loss balancer: famo": "`Balancer`, no gradient balancer",
    "parameters": "`Balancer`, by default",
    "parameters, engine=batched": '`engine="batched"`',
    "parameters, memory=gramian": '`memory="gramian"`',
    "measure=last quarter": "`measure=` the last quarter of the layers",
    "features": '`source="features"`',
    "splitter: imtl": '`Splitter(gradient="imtl")`',
    "splitter: normalized": "`Splitter()`",
    "forward + K trunk backwards": "K passes and nothing else",
    "textbook loop": "textbook loop",
    "torchjd mtl_backward + jac_to_grad": "TorchJD 0.18, `mtl_backward`",
    "torchjd autogram": "TorchJD 0.18, `autogram`",
}


def rules_table(results: dict[str, Any]) -> str:
    """Return a table of all rules: time of a solve over the number of tasks, and the worst error of both sides.

    Args:
        results: Rows by rule, by a title such as ``"K=3"``.
    """
    sizes = [title.replace("=", " = ") for title in results]
    lines = [
        f"| rule | {' | '.join(sizes)} | error at most | TorchJD 0.18: error at most |",
        "| --- |" + " --- |" * (len(sizes) + 2),
    ]
    for rule in [label for label in next(iter(results.values())) if not label.startswith(PEER)]:
        cells = [_solve(rows[rule]) for rows in results.values()]
        errors = [_worst([rows.get(label, {}).get("error") for rows in results.values()]) for label in (rule, PEER + rule)]
        lines.append(f"| `{rule}` | {' | '.join([*cells, *errors])} |")
    return "\n".join(lines)


def _solve(row: dict[str, Any]) -> str:
    factor = row.get("times_faster")
    faster = "" if factor is None else f" ({factor:.0f} x)" if factor >= 100 else f" ({factor:.1f} x)"
    return f"{row['ms']:.2f} ms{faster}"


def _worst(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.0e}" if known else "-"


def steps_table(results: dict[str, Any], num_tasks: int) -> str:
    """Return a table of all networks: time of a step relative to an ordinary step, and in brackets the further memory.

    Args:
        results: Rows by variant, by a title that begins with the network and ``K=``.
        num_tasks: K.

    Returns:
        Markdown; the memory is relative to the Jacobian.
    """
    tables = {title.split()[0]: rows for title, rows in results.items() if title.split()[1] == f"K={num_tasks}"}
    lines = [f"| step, K = {num_tasks} | {' | '.join(tables)} |", "| --- |" + " ---: |" * len(tables)]
    for variant, label in TABLE.items():
        if all("ratio" in rows.get(variant, {}) for rows in tables.values()):
            cells = [_cell(rows[variant]) for rows in tables.values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    errors = [rows["measure=last quarter"]["cosine_error"] for rows in tables.values()]
    lines.append(f"| cosines with `measure=` are off by, at most | {' | '.join(_error(error) for error in errors)} |")
    return "\n".join(lines)


def _cell(row: dict[str, float]) -> str:
    memory = round(row["extra_over_jacobian"], 2) + 0.0  # no minus before a zero
    return f"{row['ratio']:.2f} ({memory:.2f})"


def _error(error: dict[str, float]) -> str:
    return f"{error['mean']:.2f}, {error['largest']:.2f}"


def ratios_table(results: dict[str, Any]) -> str:
    """Return a table of all variants: time of a step relative to the first variant, and in brackets its memory where recorded.

    Args:
        results: Rows by variant, by a title of words such as ``"mlp K=3 P=23296"``. Words that all titles share are left out.
    """
    shared = common_words(results)
    columns = [", ".join(word.replace("=", " = ") for word in words_of(title) if word not in shared) for title in results]
    lines = [f"| step | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for variant in next(iter(results.values())):
        cells = [_ratio(rows.get(variant)) for rows in results.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_table(results: dict[str, Any]) -> str:
    """Return a table of all variants: milliseconds of a step, and in brackets the ratio to the first variant.

    Args:
        results: Rows by variant, by a title such as ``"default K=3"``.
    """
    columns = [", ".join(word.replace("=", " = ") for word in words_of(title)) for title in results]
    lines = [f"| step | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for variant in next(iter(results.values())):
        cells = [f"{rows[variant]['ms']:.3g} ms ({rows[variant]['ratio']:.2f})" for rows in results.values()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def transposed_table(results: dict[str, Any]) -> str:
    """Return a table with a row for each title, and a column for each variant except for the first, which is the unit.

    Args:
        results: Rows by variant, by a title of words such as ``"small-mlp K=3"``.
    """
    _, *variants = next(iter(results.values()))
    labels = [variant if variant.startswith("TorchJD") else f"`{variant}`" for variant in variants]
    lines = [f"| network, tasks | {' | '.join(labels)} |", "| --- |" + " ---: |" * len(variants)]
    for title, rows in results.items():
        network, tasks = title.split()
        cells = [_ratio(rows.get(variant)) for variant in variants]
        lines.append(f"| {network.replace('-', ' ')}, {tasks.replace('=', ' = ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def words_of(title: str) -> list[str]:
    """Return the words of a title, such as ``["mlp", "K=3"]``."""
    return title.replace(" = ", "=").split()


def common_words(results: dict[str, Any]) -> list[str]:
    """Return the words that all titles share, if there are several titles."""
    first, *others = map(words_of, results)
    return [word for word in first if others and all(word in other for other in others)]


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    memory = f" ({row['mib']:.1f} MiB)" if "mib" in row else ""
    return f"{row['ratio']:.2f}{memory}"


def threads_table(results: dict[str, Any]) -> str:
    """Return a table of the milliseconds of a step, by problem.

    Args:
        results: Rows by number of threads and load, by problem.
    """
    variants = list(next(iter(results.values())))
    heads = [variant.replace(", busy", " next to a busy process") for variant in variants]
    lines = [f"| problem | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(variants)]
    for problem, rows in results.items():
        lines.append(f"| `{problem}` | {' | '.join(_milliseconds(rows.get(variant)) for variant in variants)} |")
    return "\n".join(lines)


def metrics_table(results: dict[str, Any]) -> str:
    """Return a table of the share of steps that raise some loss, without and with the optimizer's metric.

    Args:
        results: Lists of rows; each row has a problem, an optimizer and a metric.
    """
    shares: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in (row for rows in results.values() for row in rows):
        shares.setdefault((row["problem"], row["optimizer"], row["method"]), {})[row["metric"]] = row["step"]
    lines = [
        "| problem | optimizer | method | step, without a metric | step, with `metric=optimizer` |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for (problem, optimizer, method), by_metric in shares.items():
        cells = [f"{100 * by_metric[metric]:.1f} %" if metric in by_metric else "-" for metric in ("gradients", "optimizer")]
        lines.append(f"| {problem} | {optimizer} | `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Write a figure with one panel for each network: time of a step relative to an ordinary step, over the number of tasks.

    Args:
        results: Rows by variant, by a title that begins with the network and ``K=``.
        file: Path of the picture.
    """
    networks = list(dict.fromkeys(title.split()[0] for title in results))
    figure, panels = plt.subplots(1, len(networks), figsize=(3.1 * len(networks) + 0.6, 3.4), sharey=True, squeeze=False)
    for panel, network in zip(panels[0], networks, strict=True):
        tables = {int(title.split()[1][2:]): rows for title, rows in results.items() if title.split()[0] == network}
        tables = dict(sorted(tables.items()))
        for variant, (label, colour, marker, line) in SHOWN.items():
            points = [(k, rows[variant]["ratio"]) for k, rows in tables.items() if "ratio" in rows.get(variant, {})]
            if points:
                panel.plot(*zip(*points, strict=True), line, color=colour, marker=marker, markersize=5, label=label)
        size = next(title for title in results if title.startswith(f"{network} ")).split("P=")[1]
        panel.set(xscale="log", yscale="log", title=f"{network} ({float(size) / 1e6:.2g} million shared)", xlabel="tasks")
        panel.set_xticks(list(tables), [str(k) for k in tables])
        panel.minorticks_off()
        panel.axhline(1, color="#BBBBBB", linewidth=0.8, zorder=0)
        panel.grid(axis="y", color="#EEEEEE", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("time of a step / ordinary step")
    ticks = [1, 2, 5, 10, 20, 50, 100, 200]
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_yticks([t for t in ticks if low <= t <= high], [str(t) for t in ticks if low <= t <= high])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def many_tasks_table(results: dict[str, Any], kind: str) -> str:
    """Return a table of one kind of steps over the number of tasks.

    Args:
        results: Rows by variant, by a title that begins with the kind and ``K=``.
        kind: ``"heads"``, ``"samples"`` or ``"rules"``.

    Returns:
        Markdown: times relative to the first variant, and in brackets its memory; of rules, milliseconds.
    """
    tables = {title.split()[1].replace("=", " = "): rows for title, rows in results.items() if title.split()[0] == kind}
    lines = [f"| {'rule' if kind == 'rules' else 'step'} | {' | '.join(tables)} |", "| --- |" + " ---: |" * len(tables)]
    for variant in next(iter(tables.values())):
        rows = [table.get(variant) for table in tables.values()]
        cells = [_milliseconds(row) if kind == "rules" else _ratio(row) for row in rows]
        lines.append(f"| {f'`{variant}`' if kind == 'rules' else variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['ms']:.2f} ms" if row["ms"] < 100 else f"{row['ms']:.0f} ms"


def draw_over_tasks(results: dict[str, Any], file: Path) -> None:
    """Write a figure with one panel for each kind of steps: milliseconds over the number of tasks, both logarithmic.

    Args:
        results: Rows by variant, by a title that begins with the kind and ``K=``.
        file: Path of the picture.
    """
    kinds = list(dict.fromkeys(title.split()[0] for title in results))
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4.6), sharey=True, squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        tables = {int(title.split()[1][2:]): rows for title, rows in results.items() if title.split()[0] == kind}
        for number, variant in enumerate(next(iter(tables.values()))):
            points = [(k, rows[variant]["ms"]) for k, rows in tables.items() if variant in rows]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "osv^Dx*P"[number % 8], "markersize": 4}
            panel.loglog(*zip(*points, strict=True), label=variant, linewidth=1.3, **style)
        panel.set(title=kind, xlabel="tasks")
        panel.set_xticks(list(tables), [str(k) for k in tables])
        panel.minorticks_off()
        panel.grid(color="#EEEEEE", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, loc="upper left")
    panels[0, 0].set_ylabel("milliseconds")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
