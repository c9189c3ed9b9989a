"""A benchmark's results as CSV, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lgssl_nnunet.evaluation.benchmark.comparison import broken_rules, gains, gap_closed, over_seeds, paired_tests
from lgssl_nnunet.evaluation.benchmark.grid import ALL
from lgssl_nnunet.evaluation.benchmark.results import Results, metric_columns
from lgssl_nnunet.evaluation.metrics import POLICY
from lgssl_nnunet.files import write_atomically
from lgssl_nnunet.inference.models import BASELINE

IN_PERCENT = ("dice", "jaccard", "surface_dice")

OTHER_METRICS = (
    "Means over the classes, named as in results_per_case.csv: overlaps in percent, hd95, assd and asd in mm."
)

RULES = (
    "No test case is used for planning, training, choosing a checkpoint or post-processing. The only other reading of "
    "a test image is the search for twins, which refuses a scan that is also in training.",
    "The model is the last checkpoint of one training on all labelled cases of the budget; its segmentations are "
    "evaluated as they are.",
    "Within one table all methods have the same planner, patches, augmentation and number of iterations. A seed draws "
    "the labelled cases and starts the training; with one budget and seed all methods have the same labelled cases.",
    f"Gain: method - {BASELINE}, mean Dice over the classes, over the seeds that both have; methods with "
    "different seeds are compared by it, and not by their means.",
    f"Gap closed: (method - {BASELINE}) / ({BASELINE} with all labels - {BASELINE}), mean Dice over the classes, over "
    "the seeds that all three have.",
    "± is the sample standard deviation over the seeds; a single seed has none.",
)


def write_tables(results: Results, folder: Path, reference: str) -> dict[str, Path]:
    """Write results_per_case.csv, results_per_cell.csv, tests.csv, results.md and results.tex.

    Args:
        results: what the benchmark folder holds.
        folder: where the files go.
        reference: the method of the paired test.

    Returns:
        The files by name.
    """
    files = {
        "results_per_case.csv": _csv(results.cases),
        "results_per_cell.csv": _csv(results.cells),
        "tests.csv": _csv(_all_tests(results, reference)),
        "results.md": _text(markdown(results, reference)),
        "results.tex": _text(latex(results, reference)),
    }
    for name, write in files.items():
        write_atomically(folder / name, write)
    return {name: folder / name for name in files}


def main_table(cases: pd.DataFrame, cells: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the table of one setting as text: Dice per class, share of the gap, p, a row per budget and method.

    Args:
        cases: rows of `Results.cases` of one setting.
        cells: rows of `Results.cells` of its finished cells.
        reference: the method of the paired test.
    """
    scores, gain, gap = over_seeds(cases, "dice"), gains(cases), gap_closed(cases)
    tests = paired_tests(cases, reference).set_index(["budget", "method"])
    sizes = cases.groupby("budget")["labeled"].first()
    minutes = cells.groupby(["budget", "method"])["training_seconds"].mean() / 60
    rows = []
    for budget, method in _order(scores["mean"]["mean"], reference):
        key = (budget, method)
        row = {"labels": f"all ({sizes[budget]})" if budget == ALL else budget, "method": method}
        row["seeds"] = str(int(scores["count"].loc[key, "mean"]))
        for column in scores["mean"].columns:
            row[f"Dice {column}"] = spread(scores["mean"].loc[key, column], scores["std"].loc[key, column], "dice")
        row["gain"] = spread(*gain.get(key, (math.nan, math.nan)), "dice", signed=True)
        row["gap closed"] = f"{100 * gap[key]:.0f} %" if key in gap.index and not math.isnan(gap[key]) else "-"
        row["p (Holm)"] = p_value(tests.loc[key, "p_holm"]) if key in tests.index else "-"
        row["training [min]"] = "-" if math.isnan(minutes[key]) else f"{minutes[key]:.0f}"
        rows.append(row)
    return pd.DataFrame(rows)


def other_metrics_table(cases: pd.DataFrame, metrics: Sequence[str], reference: str) -> pd.DataFrame:
    """Return the means over the classes of further metrics of one setting as text, a row per budget and method."""
    scores = {metric: over_seeds(cases, metric) for metric in metrics}
    dice = over_seeds(cases, "dice")["mean"]["mean"]
    return pd.DataFrame(
        [
            {"labels": budget, "method": method}
            | {
                metric: spread(
                    table["mean"].loc[(budget, method), "mean"], table["std"].loc[(budget, method), "mean"], metric
                )
                for metric, table in scores.items()
            }
            for budget, method in _order(dice, reference)
        ]
    )


def spread(mean: float, deviation: float, metric: str, signed: bool = False) -> str:
    """Return "83.3 ± 0.4", in percent for overlaps; without the deviation for a single seed, "-" for no value."""
    if math.isnan(mean):
        return "-"
    factor, digits = (100, 1) if metric in IN_PERCENT else (1, 2)
    text = f"{factor * mean:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(deviation) else f"{text} ± {factor * deviation:.{digits}f}"


def p_value(value: float) -> str:
    """Return a p-value with three digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def markdown(results: Results, reference: str) -> str:
    """Return the whole page: tables per setting, rules, failures, and how it was made."""
    parts = ["# Benchmark"]
    parts += [f"**Not a fair comparison:** {sentence}" for sentence in broken_rules(results)]
    for setting, cases, cells in results.settings():
        others = [metric for metric in metric_columns(cases) if metric != "dice" and cases[metric].notna().any()]
        table = main_table(cases, cells, reference)
        parts += [f"## {_title(setting)}", _caption(cases, reference), _markdown_table(table)]
        if others:
            parts += [OTHER_METRICS, _markdown_table(other_metrics_table(cases, others, reference))]
    if not results.records:
        parts.append("No cell is finished yet.")
    if results.failed:
        parts += ["## Failed cells", "\n".join(f"- {_cell(r)}: {_line(r['error'])}" for r in results.failed)]
    parts += ["## Rules", "\n".join(f"- {rule}" for rule in (*RULES, POLICY))]
    parts += ["## How this was made", "\n".join(f"- {line}" for line in _how(results.records))]
    return "\n\n".join(parts) + "\n"


def latex(results: Results, reference: str) -> str:
    """Return one LaTeX table per setting, for the package booktabs; needs UTF-8 input."""
    tables = [
        main_table(cases, cells, reference)
        .to_latex(index=False, escape=True, caption=_title(setting).replace("_", r"\_"), column_format=None)
        .replace("±", r"$\pm$")
        for setting, cases, cells in results.settings()
    ]
    return "\n".join(tables) or "% no cell is finished yet\n"


def _all_tests(results: Results, reference: str) -> pd.DataFrame:
    tables = []
    for setting, cases, _ in results.settings():
        table = paired_tests(cases, reference)
        for position, (name, value) in enumerate({**setting, "reference": reference}.items()):
            table.insert(position, name, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _order(dice: pd.Series, reference: str) -> Iterator[tuple[str, str]]:
    """Yield budget and method: budgets ascending, all last; the reference first, then by falling Dice."""
    found = dict.fromkeys(dice.index.get_level_values("budget"))
    budgets = sorted((b for b in found if b != ALL), key=int) + [b for b in found if b == ALL]
    for budget in budgets:
        methods = dice[budget].sort_values(ascending=False, kind="stable").index
        yield from ((budget, method) for method in sorted(methods, key=lambda method: method != reference))


def _title(setting: Mapping[str, Any]) -> str:
    spacing = f", spacing {setting['spacing']} mm" if setting["spacing"] else ""
    return (
        f"{setting['dataset']}, {setting['configuration']}, {setting['planner']}{spacing}, "
        f"{setting['iterations']} iterations"
    )


def _caption(cases: pd.DataFrame, reference: str) -> str:
    number = cases["case"].nunique()
    text = f"Dice in percent, mean ± standard deviation over seeds; {number} test cases. "
    if reference not in set(cases["method"]):
        return text + f"No test: {reference}, the reference, has no finished cell here."
    text += (
        f"p: Wilcoxon's signed-rank test against {reference}, two-sided, paired by test case (mean over the classes, "
        "averaged over common seeds), Holm-corrected over the methods of a budget."
    )
    least = 2.0 ** (1 - number)
    return text + (
        f" With {number} cases p cannot be smaller than {least:.3f} before correction." if least > 1e-3 else ""
    )


def _markdown_table(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(entry).replace("|", "\\|") for entry in line) + " |" for line in lines)


def _how(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return commands, versions, hardware and time as lines."""
    lines = [f"`{command}`" for command in _distinct(record["command"] for record in records)]
    for entries in _distinct(", ".join(f"{k} {v}" for k, v in r["versions"].items() if v) for r in records):
        lines.append(f"Versions: {entries}")
    for entries in _distinct(
        f"{r['hardware']['device']}, {r['hardware']['processor']}, {r['hardware']['cores']} cores" for r in records
    ):
        lines.append(f"Hardware: {entries}")
    seconds = [record["training_seconds"] for record in records if record["training_seconds"] is not None]
    if seconds:
        lines.append(f"Training: {sum(seconds) / 3600:.1f} hours in {len(seconds)} trainings")
    adopted = sum(bool(record["adopted"]) for record in records)
    if adopted:
        lines.append(
            f"{adopted} of the {len(records)} models were trained before, by lgssl_train or another benchmark, with "
            "the same plans and options; the versions and hardware above are those of their prediction and evaluation."
        )
    if records:
        first, last = min(r["started"] for r in records), max(r["finished"] for r in records)
        lines.append(f"Time: {first} to {last}")
    return lines


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _cell(record: Mapping[str, Any]) -> str:
    cell = record["cell"]
    settings = "".join(f", {name}={value}" for name, value in cell["settings"].items())
    return f"{cell['dataset']}, {cell['trainer']}{settings}, labels {cell['budget']}, seed {cell['seed']}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _csv(table: pd.DataFrame) -> Callable[[Path], None]:
    return lambda file: table.to_csv(file, index=False)


def _text(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(text, encoding="utf-8")
