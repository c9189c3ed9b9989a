"""Overlap by hand, the one policy for empty masks, means and their table."""

from __future__ import annotations

import math

import pytest

from lgssl_nnunet.evaluation.lesions import LesionCounts
from lgssl_nnunet.evaluation.metrics import (
    POLICY,
    class_means,
    class_result,
    foreground_mean,
    with_lesions,
    with_surfaces,
)
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
    assert foreground_mean([liver, tumour]) == {"dice": 0.5, "jaccard": 0.5, "volume_similarity": 0.5}


@pytest.mark.parametrize(
    ("counts", "similarity"),
    [((6, 2, 4), 1 - 2 / 18), ((0, 5, 5), 1.0), ((0, 3, 0), 0.0), ((0, 0, 3), 0.0), ((2, 4, 0), 0.5)],
)
def test_volume_similarity_compares_sizes_only(counts, similarity):
    assert class_result("x", "1", "liver", *counts).volume_similarity == pytest.approx(similarity)


COLUMNS = ("hd95", "assd", "surface_dice", "hd95_medpy", "asd_medpy")


def never():
    raise AssertionError("a library was asked about an empty mask")


def surfaces_of(result):
    return {column: getattr(result, column) for column in COLUMNS}


@pytest.mark.parametrize("counts", [(0, 3, 0), (0, 0, 3)])
def test_one_empty_mask_costs_the_whole_diagonal_and_no_library_is_asked(counts):
    result = with_surfaces(class_result("x", "1", "liver", *counts), COLUMNS, never, diagonal=123.5)
    assert surfaces_of(result) == dict.fromkeys(COLUMNS, 123.5) | {"surface_dice": 0.0}
    assert (result.dice, result.volume_similarity) == (0, 0)


def test_two_empty_masks_have_no_distance_and_no_library_is_asked():
    result = with_surfaces(class_result("x", "1", "liver", 0, 0, 0), COLUMNS, never, diagonal=123.5)
    assert all(math.isnan(value) for value in surfaces_of(result).values())
    assert math.isnan(result.volume_similarity)


def test_two_masks_are_measured_even_where_they_do_not_touch():
    measured = dict(zip(COLUMNS, (5.0, 4.0, 0.5, 3.0, 2.0), strict=True))
    result = with_surfaces(class_result("x", "1", "liver", 0, 2, 2), COLUMNS, lambda: measured, diagonal=123.5)
    assert surfaces_of(result) == measured


def test_columns_that_cannot_be_measured_stay_none_whatever_the_masks():
    for counts in [(1, 1, 1), (0, 3, 0), (0, 0, 0)]:
        result = with_surfaces(class_result("x", "1", "liver", *counts), COLUMNS[:3], lambda: {}, diagonal=9.0)
        assert result.hd95_medpy is None
        assert result.asd_medpy is None


def test_mean_distances_hold_the_diagonals_of_missed_classes_and_leave_out_both_empty():
    counts = {"a": (5, 1, 1), "b": (0, 0, 0), "c": (0, 4, 0)}
    results = [
        with_surfaces(class_result(case, "1", "liver", *values), ("hd95",), lambda: {"hd95": 2.0}, diagonal=100.0)
        for case, values in counts.items()
    ]
    (liver,) = class_means(results)
    assert liver.hd95 == pytest.approx(51)
    assert liver.assd is None
    assert foreground_mean([liver])["hd95"] == pytest.approx(51)
    assert "assd" not in foreground_mean([liver])


def test_sensitivity_is_over_all_lesions_and_false_positives_are_per_case():
    lesions = [LesionCounts(4, 3, 3, 0), LesionCounts(1, 0, 0, 0), LesionCounts(0, 2, 0, 2), LesionCounts(0, 0, 0, 0)]
    counts = [(5, 1, 1), (0, 0, 2), (0, 4, 0), (0, 0, 0)]
    results = [with_lesions(class_result(str(n), "2", "tumour", *counts[n]), found) for n, found in enumerate(lesions)]
    assert [result.lesion_sensitivity for result in results[:2]] == [0.75, 0.0]
    assert math.isnan(results[2].lesion_sensitivity)
    assert math.isnan(results[3].lesion_sensitivity)
    assert [result.lesion_false_positives for result in results] == [0, 0, 2, 0]
    (tumour,) = class_means(results)
    assert (tumour.lesions, tumour.lesions_found, tumour.lesion_sensitivity) == (5, 3, pytest.approx(0.6))
    assert tumour.lesion_false_positives == pytest.approx(0.5)


def test_the_table_shows_names_counts_and_the_policy():
    text = class_table(class_means([class_result("a", "(1, 2)", "liver", 3, 1, 1)]))
    header, _, row, mean, *_ = text.splitlines()
    assert header.split() == ["class", "label", "Dice", "Jaccard", "VolSim", "cases", "both", "empty", "one", "empty"]
    assert row.split() == ["liver", "(1,", "2)", "0.7500", "0.6000", "1.0000", "1", "0", "0"]
    assert mean.split() == ["mean", "0.7500", "0.6000", "1.0000"]
    assert text.endswith(POLICY)


def test_the_table_shows_distances_with_their_tolerance_and_lesions_apart():
    results = [
        with_surfaces(class_result("a", "1", "liver", 3, 1, 1), ("hd95",), lambda: {"hd95": 2.0}, diagonal=9.0),
        with_lesions(class_result("a", "2", "tumour", 3, 1, 1), LesionCounts(4, 3, 3, 1)),
    ]
    metrics, lesions, explanation = class_table(class_means(results), tolerance=2.5).split("\n\n")
    assert metrics.splitlines()[2].split() == ["liver", "1", "0.7500", "0.6000", "1.0000", "2.00", "1", "0", "0"]
    assert metrics.splitlines()[3].split() == ["tumour", "2", "0.7500", "0.6000", "1.0000", "-", "1", "0", "0"]
    assert lesions.splitlines()[2].split() == ["tumour", "2", "4", "3", "0.7500", "1.00"]
    assert "at a tolerance of 2.5 mm" in explanation
    assert "26 neighbours" in explanation
