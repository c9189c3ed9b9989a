"""Methods against each other: spread over seeds, share of the gap closed, a paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from lgssl_nnunet.evaluation.benchmark.grid import ALL
from lgssl_nnunet.evaluation.benchmark.records import FINISHED
from lgssl_nnunet.evaluation.benchmark.results import SETTING, Results, class_means
from lgssl_nnunet.inference.models import BASELINE

DECIMALS_OF_A_DIFFERENCE = 9
"""Averages of equal numbers in another order differ in the last digits, which is no difference."""


def over_seeds(cases: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """Return mean, sample standard deviation and number of seeds of each class and of the mean over classes.

    Args:
        cases: rows of one setting.
        metric: a metric column.

    Returns:
        "mean", "std" (NaN for one seed) and "count": a row per budget and method, a column per class and "mean".
    """
    groups = class_means(cases, metric).groupby(["budget", "method"], sort=False)
    return {"mean": groups.mean(), "std": groups.std(ddof=1), "count": groups.count()}


def gap_closed(cases: pd.DataFrame, metric: str = "dice") -> pd.Series:
    """Return (method - supervised) / (all labels - supervised), from means over the seeds that all three have.

    Args:
        cases: rows of one setting.
        metric: a metric column.

    Returns:
        The share by budget and method; NaN without a common seed, and where all labels are no better than the few, so
        that there is no gap. Neither the baseline nor the budget "all" is in it.
    """
    scores = class_means(cases, metric)["mean"]
    shares = {
        (budget, method): _share(_by_seed(scores, budget, method), _by_seed(scores, budget), _by_seed(scores, ALL))
        for budget, method in _compared(scores)
    }
    index = pd.MultiIndex.from_tuples(shares, names=["budget", "method"]) if shares else None
    return pd.Series(list(shares.values()), index=index, dtype=float, name="gap closed")


def gains(cases: pd.DataFrame, metric: str = "dice") -> dict[tuple[str, str], tuple[float, float]]:
    """Return method - supervised: mean and sample standard deviation over the seeds that both have.

    Methods with different seeds can be compared by it, and not by their means: seeds draw the labelled cases.

    Args:
        cases: rows of one setting.
        metric: a metric column.

    Returns:
        By budget and method; the deviation is NaN for one common seed, both without any. Neither the baseline nor the
        budget "all" is in it.
    """
    scores = class_means(cases, metric)["mean"]
    found = {}
    for budget, method in _compared(scores):
        own, supervised = _by_seed(scores, budget, method), _by_seed(scores, budget)
        differences = pd.Series([own[seed] - supervised[seed] for seed in own.keys() & supervised.keys()], dtype=float)
        found[budget, method] = (float(differences.mean()), float(differences.std(ddof=1)))
    return found


def _compared(scores: pd.Series) -> list[tuple[str, str]]:
    """Return budget and method of all that is compared with the baseline."""
    keys = dict.fromkeys(scores.index.droplevel(["labeled", "seed"]))
    return [(budget, method) for budget, method in keys if budget != ALL and method != BASELINE]


def _by_seed(scores: pd.Series, budget: str, method: str = BASELINE) -> dict[int, float]:
    rows = scores.reset_index()
    return rows[(rows["budget"] == budget) & (rows["method"] == method)].set_index("seed")["mean"].to_dict()


def _share(method: dict[int, float], supervised: dict[int, float], upper: dict[int, float]) -> float:
    seeds = sorted(method.keys() & supervised.keys() & upper.keys())
    if not seeds:
        return math.nan
    low, high, reached = (float(np.mean([by[seed] for seed in seeds])) for by in (supervised, upper, method))
    return (reached - low) / (high - low) if high > low else math.nan


def paired_tests(cases: pd.DataFrame, reference: str, metric: str = "dice") -> pd.DataFrame:
    """Test each method against the reference: Wilcoxon's signed-rank test, two-sided, Holm-corrected per budget.

    A pair is a test case: its mean over the classes, averaged over the seeds that method and reference have in common.

    Args:
        cases: rows of one setting.
        reference: the method that the others are compared with.
        metric: a metric column.

    Returns:
        One row per budget and method other than the reference: `cases` (pairs), `seeds` (in common), `difference`
        (mean over the pairs), `p`, `p_holm`. Without a seed or case in common there is no row.
    """
    per_case = cases.groupby(["budget", "method", "seed", "case"], sort=False)[metric].mean()
    rows = []
    for budget in dict.fromkeys(cases["budget"]):
        methods = list(dict.fromkeys(cases.loc[cases["budget"] == budget, "method"]))
        if reference not in methods:
            continue
        tested = [_test(per_case, budget, method, reference) for method in methods if method != reference]
        tested = [row for row in tested if row is not None]
        corrected = holm([row["p"] for row in tested])
        rows += [row | {"p_holm": value} for row, value in zip(tested, corrected, strict=True)]
    return pd.DataFrame(rows, columns=["budget", "method", "cases", "seeds", "difference", "p", "p_holm"])


def _test(per_case: pd.Series, budget: str, method: str, reference: str) -> dict | None:
    tables = [per_case[budget][name].unstack("seed") for name in (method, reference)]
    seeds = [seed for seed in tables[0].columns if seed in tables[1].columns]
    if not seeds:
        return None
    both = pd.concat([table[seeds].mean(axis=1) for table in tables], axis=1, join="inner").dropna()
    if both.empty:
        return None
    difference = (both[0] - both[1]).round(DECIMALS_OF_A_DIFFERENCE)
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return {
        "budget": budget,
        "method": method,
        "cases": len(both),
        "seeds": len(seeds),
        "difference": float(difference.mean()),
        "p": p,
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction of p-values, in the order in which they were given."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * float(p_values[position]))
        corrected[position] = min(1.0, largest)
    return corrected


def broken_rules(results: Results) -> list[str]:
    """Return, in sentences, where cells that are compared had other labelled or other test cases."""
    if not results.records:
        return []
    finished = results.cells[results.cells["status"] == FINISHED].reset_index(drop=True)
    sentences = []
    for columns, entry, words in (
        ([*SETTING, "budget", "seed"], "labeled", "labelled cases"),
        (SETTING, "test", "test cases"),
    ):
        for key, rows in finished.groupby(columns, dropna=False):
            if len({tuple(sorted(results.records[row][entry])) for row in rows.index}) > 1:
                where = ", ".join(str(part) for part in key if part != "")
                sentences.append(
                    f"{where}: the {words} differ between methods, because the dataset was changed in between; remove "
                    "the older cells from the benchmark folder and run them again."
                )
    return sentences
