"""Partial labels on Hippocampus: the trainings on the datasets of partial_labels_raw.py, side by side.

    B="--seeds 0 1 2 --iterations 1000 -pl LGSSLPlannerCPU"
    lgssl_benchmark -d 521 --trainers LGSSLTrainer LGSSLTrainer:prompt_source=random --budgets 8 $B
    lgssl_benchmark -d 522 --trainers LGSSLTrainer --budgets 8 $B
    lgssl_benchmark -d 523 --trainers LGSSLTrainer --budgets 4 $B
    lgssl_benchmark -d 524 --trainers LGSSLTrainer --budgets 4 $B
    lgssl_benchmark -d 510 --trainers LGSSLTrainer --budgets 4 $B
    python benchmarks/partial_labels_table.py nnUNet_results/benchmark/results_per_case.csv

Two single-class models count as one method, which has either class from its own model. Test cases are the same in all
five datasets, so that methods are paired by case; the reference is the one model that knows what each case annotates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from lgssl_nnunet.evaluation.benchmark.comparison import over_seeds, paired_tests
from lgssl_nnunet.evaluation.benchmark.tables import p_value, spread

BUDGET = "8"
REFERENCE = "one model, `annotated` says what is known"
SINGLE = "two models of one class, 4 cases each"
WHOLE = "one model, 4 of the 8 cases with both classes"
METHODS = {
    ("HippocampusPartial", "8", "LGSSLTrainer"): REFERENCE,
    ("HippocampusPartial", "8", "LGSSLTrainer:prompt_source=random"): "the same with random vectors for text",
    ("HippocampusAsBackground", "8", "LGSSLTrainer"): "one model, the missing class is background",
    ("HippocampusFirst", "4", "LGSSLTrainer"): SINGLE,
    ("HippocampusSecond", "4", "LGSSLTrainer"): SINGLE,
    ("Hippocampus", "4", "LGSSLTrainer"): WHOLE,
}


def compared(cases: pd.DataFrame, iterations: int) -> pd.DataFrame:
    """Return the rows of the trainings that are compared, as methods of one budget.

    Args:
        cases: results_per_case.csv of lgssl_benchmark, all as text but the Dice.
        iterations: of the trainings that count.

    Raises:
        SystemExit: some seed of two single-class models has one of them only.
    """
    cases = cases[cases["iterations"] == str(iterations)]
    keys = zip(cases["dataset"].str.partition("_")[2], cases["budget"], cases["method"], strict=True)
    names = [METHODS.get(key) for key in keys]
    rows = cases.assign(method=names, budget=BUDGET, labeled=BUDGET).dropna(subset="method")
    models = rows[rows["method"] == SINGLE].groupby("seed")["dataset"].nunique()
    if (models < 2).any():
        raise SystemExit(f"Seed {models[models < 2].index[0]} has one of the two single-class models; train the other.")
    return rows


def table(rows: pd.DataFrame) -> str:
    """Return Dice per class and the paired test against the reference as Markdown, in the order of `METHODS`."""
    scores, tests = over_seeds(rows, "dice"), paired_tests(rows, REFERENCE).set_index("method")
    columns = list(scores["mean"].columns)
    lines = [f"| method | seeds | {' | '.join(f'Dice {name}' for name in columns)} | difference | p (Holm) |"]
    lines.append("| --- " * (len(columns) + 4) + "|")
    for method in (name for name in dict.fromkeys(METHODS.values()) if (BUDGET, name) in scores["mean"].index):
        mean, deviation = (scores[kind].loc[(BUDGET, method)] for kind in ("mean", "std"))
        dice = " | ".join(spread(mean[name], deviation[name], "dice") for name in columns)
        against = "- | -"
        if method in tests.index:
            test = tests.loc[method]
            against = f"{100 * test['difference']:+.1f} | {p_value(test['p_holm'])}"
        lines.append(f"| {method} | {scores['count'].loc[(BUDGET, method), 'mean']} | {dice} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare what partial labels are worth on Hippocampus.")
    parser.add_argument("csv", type=Path, help="results_per_case.csv of lgssl_benchmark")
    parser.add_argument("--iterations", type=int, default=1000)
    arguments = parser.parse_args()
    text = pd.read_csv(arguments.csv, dtype=str, keep_default_na=False)
    numbers = text.assign(dice=pd.to_numeric(text["dice"], errors="coerce"))
    print(table(compared(numbers, arguments.iterations)))
