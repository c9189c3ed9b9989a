"""Statistics of a benchmark against values computed by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy.stats import wilcoxon

from lgssl_nnunet.evaluation.benchmark.comparison import broken_rules, gains, gap_closed, holm, over_seeds, paired_tests
from lgssl_nnunet.evaluation.benchmark.results import Results, class_means, metric_columns

SUPERVISED, METHOD, OTHER = "SupervisedTrainer", "LGSSLTrainer", "MCFTrainer"


def rows(method: str, seed: int, dice: dict[str, list[float]], budget: str = "4", labeled: int = 4) -> pd.DataFrame:
    """The rows of one cell: the Dice of each case by class."""
    return pd.DataFrame(
        [
            {
                "budget": budget, "labeled": labeled, "method": method, "seed": seed,
                "case": f"case_{number}", "class": name, "dice": value,
            }
            for name, values in dice.items()
            for number, value in enumerate(values)
        ]
    )  # fmt: skip


def one_class(method: str, seed: int, *values: float, **options) -> pd.DataFrame:
    return rows(method, seed, {"liver": list(values)}, **options)


def test_a_cell_counts_classes_alike_and_leaves_out_cases_without_a_value():
    cell = rows(SUPERVISED, 0, {"liver": [0.8, 0.6], "tumour": [math.nan, 0.1]})
    assert class_means(cell, "dice").iloc[0].to_dict() == pytest.approx({"liver": 0.7, "tumour": 0.1, "mean": 0.4})


def test_mean_and_sample_deviation_are_over_seeds_not_over_cases():
    cases = pd.concat([one_class(METHOD, seed, value - 0.3, value + 0.3) for seed, value in enumerate((0.5, 0.6, 0.7))])
    scores = over_seeds(cases, "dice")
    assert scores["mean"].loc[("4", METHOD), "mean"] == pytest.approx(0.6)
    assert scores["std"].loc[("4", METHOD), "mean"] == pytest.approx(0.1)
    assert scores["count"].loc[("4", METHOD), "mean"] == 3


def test_one_seed_has_no_deviation():
    assert math.isnan(over_seeds(one_class(METHOD, 0, 0.5), "dice")["std"].loc[("4", METHOD), "mean"])


# ----------------------------------------------------------------------------------------------------------------- gain


def test_the_gain_is_over_the_seeds_that_method_and_baseline_have():
    cases = pd.concat(
        [
            *(one_class(SUPERVISED, seed, value) for seed, value in ((0, 0.60), (1, 0.70), (2, 0.00))),
            *(one_class(METHOD, seed, value) for seed, value in ((0, 0.70), (1, 0.74), (3, 0.99))),
            one_class(OTHER, 1, 0.65),
            one_class(SUPERVISED, 0, 0.84, budget="all", labeled=10),
        ]
    )
    found = gains(cases)
    assert set(found) == {("4", METHOD), ("4", OTHER)}
    assert found["4", METHOD] == pytest.approx((0.07, 0.06 / math.sqrt(2)))
    assert found["4", OTHER] == pytest.approx((-0.05, math.nan), nan_ok=True)


def test_there_is_no_gain_without_a_common_seed():
    found = gains(pd.concat([one_class(METHOD, 0, 0.7), one_class(SUPERVISED, 1, 0.6)]))
    assert all(math.isnan(value) for value in found["4", METHOD])


# ----------------------------------------------------------------------------------------------------- share of the gap


def test_the_share_of_the_gap_is_that_of_the_means_over_common_seeds():
    cases = pd.concat(
        [
            one_class(SUPERVISED, 0, 0.60),
            one_class(SUPERVISED, 1, 0.70),
            one_class(SUPERVISED, 2, 0.00),  # no other has seed 2
            one_class(METHOD, 0, 0.70),
            one_class(METHOD, 1, 0.75),
            one_class(SUPERVISED, 0, 0.84, budget="all", labeled=10),
            one_class(SUPERVISED, 1, 0.86, budget="all", labeled=10),
        ]
    )
    share = gap_closed(cases)
    assert share.to_dict() == pytest.approx({("4", METHOD): (0.725 - 0.65) / (0.85 - 0.65)})


def test_a_method_may_lose_and_may_pass_the_upper_bound():
    base = [one_class(SUPERVISED, 0, 0.6), one_class(SUPERVISED, 0, 0.8, budget="all", labeled=10)]
    cases = pd.concat([*base, one_class(METHOD, 0, 0.5), one_class(OTHER, 0, 0.9)])
    assert gap_closed(cases).to_dict() == pytest.approx({("4", METHOD): -0.5, ("4", OTHER): 1.5})


@pytest.mark.parametrize(
    "others",
    [
        [],
        [one_class(SUPERVISED, 0, 0.6)],
        [one_class(SUPERVISED, 0, 0.6), one_class(SUPERVISED, 1, 0.8, budget="all", labeled=10)],
        [one_class(SUPERVISED, 0, 0.6), one_class(SUPERVISED, 0, 0.6, budget="all", labeled=10)],
    ],
    ids=["no baseline", "no upper bound", "no common seed", "no gap"],
)
def test_there_is_no_share_without_a_gap(others):
    assert math.isnan(gap_closed(pd.concat([one_class(METHOD, 0, 0.7), *others]))[("4", METHOD)])


# ------------------------------------------------------------------------------------------------------ the paired test


def test_the_test_pairs_cases_averaged_over_classes_and_common_seeds():
    reference = [
        rows(SUPERVISED, seed, {"liver": [0.5] * 6, "tumour": [0.3] * 6}) for seed in (0, 1)
    ] + [rows(SUPERVISED, 2, {"liver": [0.9] * 6, "tumour": [0.9] * 6})]  # fmt: skip
    better = [
        rows(METHOD, 0, {"liver": [0.5 + 0.01 * n for n in range(1, 7)], "tumour": [0.3] * 6}),
        rows(METHOD, 1, {"liver": [0.5 + 0.03 * n for n in range(1, 7)], "tumour": [0.3] * 6}),
    ]
    (found,) = paired_tests(pd.concat([*reference, *better]), SUPERVISED).to_dict("records")
    # Per case (0.01 n + 0.03 n) / 2 / 2 = 0.01 n; all six positive: 2 of the 2^6 sign patterns are as extreme.
    assert found["difference"] == pytest.approx(0.01 * 3.5)
    assert (found["cases"], found["seeds"]) == (6, 2)
    assert found["p"] == pytest.approx(2 / 64)
    assert found["p_holm"] == pytest.approx(2 / 64)


def test_the_order_of_cases_does_not_matter_and_only_common_cases_count():
    reference = one_class(SUPERVISED, 0, 0.5, 0.6, 0.7, 0.8)
    method = one_class(METHOD, 0, 0.6, 0.5, 0.9, 0.9, 0.1).sample(frac=1, random_state=0)
    (found,) = paired_tests(pd.concat([reference, method]), SUPERVISED).to_dict("records")
    assert found["cases"] == 4
    assert found["p"] == pytest.approx(wilcoxon([0.1, -0.1, 0.2, 0.1]).pvalue)


def test_equal_results_give_p_one_although_averages_differ_in_the_last_digit():
    values = (0.1, 0.2, 0.3)
    reference = [one_class(SUPERVISED, seed, values[seed]) for seed in (0, 1, 2)]
    method = [one_class(METHOD, seed, values[2 - seed]) for seed in (0, 1, 2)]
    (found,) = paired_tests(pd.concat([*reference, *method]), SUPERVISED).to_dict("records")
    assert (found["p"], found["difference"]) == (1.0, 0.0)


def test_methods_are_corrected_within_a_budget_and_not_across_budgets():
    def at(budget: str) -> list[pd.DataFrame]:
        base = [0.5] * 6
        return [
            one_class(SUPERVISED, 0, *base, budget=budget),
            one_class(METHOD, 0, *(0.5 + 0.01 * n for n in range(1, 7)), budget=budget),
            one_class(OTHER, 0, *(0.5 + 0.01 * n for n in (1, 2, 3, 4, 5, -6)), budget=budget),
        ]

    found = paired_tests(pd.concat([*at("4"), *at("8")]), SUPERVISED).set_index(["budget", "method"])
    assert len(found) == 4
    for budget in ("4", "8"):
        assert found.loc[(budget, METHOD), "p_holm"] == pytest.approx(2 * 2 / 64)
        assert found.loc[(budget, OTHER), "p_holm"] == pytest.approx(found.loc[(budget, OTHER), "p"])


def test_a_reference_that_is_not_there_gives_no_test():
    assert paired_tests(one_class(METHOD, 0, 0.5), SUPERVISED).empty
    different_seeds = pd.concat([one_class(METHOD, 0, 0.5), one_class(SUPERVISED, 1, 0.5)])
    assert paired_tests(different_seeds, SUPERVISED).empty


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01, then 2 x 0.03, then 0.04 raised to it
        ([0.04, 0.01], [0.04, 0.02]),
        ([0.6, 0.5], [1.0, 1.0]),
    ],
)
def test_holm_corrects_from_the_smallest_on_and_never_decreases(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected)


# ------------------------------------------------------------------------------------------------------- what compares


def results(*cells: tuple[str, int, list[str], list[str]]) -> Results:
    table = pd.DataFrame(
        [
            {
                "dataset": "D", "configuration": "3d_fullres", "planner": "P", "spacing": "", "iterations": 10,
                "budget": "4", "labeled": 4, "method": method, "seed": seed, "status": "finished",
            }
            for method, seed, _, _ in cells
        ]
    )  # fmt: skip
    records = [{"labeled": labeled, "test": test} for _, _, labeled, test in cells]
    return Results(pd.DataFrame(), table, records, [])


def test_methods_of_one_seed_must_have_the_same_labelled_cases_and_all_the_same_test_cases():
    same = results((SUPERVISED, 0, ["a", "b"], ["t"]), (METHOD, 0, ["b", "a"], ["t"]), (METHOD, 1, ["c", "d"], ["t"]))
    assert broken_rules(same) == []
    (draw,) = broken_rules(results((SUPERVISED, 0, ["a", "b"], ["t"]), (METHOD, 0, ["a", "c"], ["t"])))
    assert "D, 3d_fullres, P, 10, 4, 0: the labelled cases differ" in draw
    (test,) = broken_rules(results((SUPERVISED, 0, ["a"], ["t"]), (SUPERVISED, 1, ["b"], ["t", "u"])))
    assert "the test cases differ" in test


def test_metrics_are_the_numeric_columns_of_the_evaluation_that_are_no_counts():
    table = one_class(METHOD, 0, 0.5).assign(
        jaccard=0.4, hd95=2.0, n_reference=5, lesions_found=1, lesion_sensitivity=1.0, label="1", status="measured"
    )[["n_reference", "hd95", "jaccard", "dice", "lesions_found", "lesion_sensitivity", "label", "status", "class"]]
    assert metric_columns(table) == ["dice", "jaccard", "hd95", "lesion_sensitivity"]
