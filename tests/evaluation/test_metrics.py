"""Dice and Jaccard by hand, and the one policy for empty masks."""

from __future__ import annotations

import math

import pytest

from lgssl_nnunet.evaluation.metrics import class_means, class_result, foreground_mean
from lgssl_nnunet.evaluation.tables import class_table


@pytest.mark.parametrize(
    ("true_pos", "false_pos", "false_neg", "dice", "jaccard", "status"),
    [
        (6, 2, 4, 12 / 18, 6 / 12, "measured"),
        (5, 0, 0, 1.0, 1.0, "measured"),
        (0, 3, 4, 0.0, 0.0, "measured"),
        (0, 3, 0, 0.0, 0.0, "reference empty"),
        (0, 0, 3, 0.0, 0.0, "prediction empty"),
    ],
)
def test_overlap_of_counted_voxels(true_pos, false_pos, false_neg, dice, jaccard, status):
    result = class_result("x", "1", "liver", true_pos, false_pos, false_neg)
    assert (result.dice, result.jaccard, result.status) == (pytest.approx(dice), pytest.approx(jaccard), status)
    assert (result.n_reference, result.n_prediction) == (true_pos + false_neg, true_pos + false_pos)


def test_two_empty_masks_have_no_overlap_to_measure():
    result = class_result("x", "1", "liver", 0, 0, 0)
    assert math.isnan(result.dice)
    assert math.isnan(result.jaccard)
    assert result.status == "both empty"


def test_means_leave_out_both_empty_cases_and_count_every_kind():
    results = [
        class_result("a", "1", "liver", 5, 0, 0),
        class_result("b", "1", "liver", 0, 0, 0),
        class_result("c", "1", "liver", 0, 4, 0),
        class_result("a", "2", "tumour", 0, 0, 0),
    ]
    liver, tumour = class_means(results)
    assert (liver.dice, liver.cases, liver.both_empty, liver.one_empty) == (0.5, 2, 1, 1)
    assert math.isnan(tumour.dice)
    assert (tumour.cases, tumour.both_empty) == (0, 1)
    assert foreground_mean([liver, tumour]) == (0.5, 0.5)


def test_the_table_shows_names_counts_and_the_policy():
    text = class_table(class_means([class_result("a", "(1, 2)", "liver", 3, 1, 1)]))
    header, _, row, mean, *_ = text.splitlines()
    assert header.split() == ["class", "label", "Dice", "Jaccard", "cases", "both", "empty", "one", "empty"]
    assert row.split() == ["liver", "(1,", "2)", "0.7500", "0.6000", "1", "0", "0"]
    assert mean.split() == ["mean", "0.7500", "0.6000"]
    assert "left out of the mean" in text
