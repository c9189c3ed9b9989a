"""Lesions counted by hand, and the classes that are made of them."""

from __future__ import annotations

import numpy as np
import pytest

from lgssl_nnunet.evaluation.lesions import LesionCounts, count_lesions, lesion_class_names


def mask(*voxels, shape=(10, 10, 10)):
    array = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        array[voxel] = True
    return array


def test_found_missed_and_invented_lesions_are_counted():
    reference = mask(np.s_[0:3, 0:3, 0:3], np.s_[6:8, 6:8, 6:8], (9, 0, 0))
    prediction = mask((2, 2, 2), np.s_[0:2, 7:9, 0:2], np.s_[4, 4, 4])
    assert count_lesions(reference, prediction) == LesionCounts(reference=3, prediction=3, found=1, false_positives=2)


def test_one_prediction_may_find_two_lesions_and_two_may_find_one():
    two = mask(np.s_[0:2, 0, 0], np.s_[4:6, 0, 0])
    one = mask(np.s_[0:6, 0, 0])
    assert count_lesions(two, one) == LesionCounts(reference=2, prediction=1, found=2, false_positives=0)
    assert count_lesions(one, two) == LesionCounts(reference=1, prediction=2, found=1, false_positives=0)


@pytest.mark.parametrize("neighbour", [(5, 5, 6), (5, 6, 6), (6, 6, 6), (4, 6, 4)])
def test_voxels_that_share_a_face_an_edge_or_a_corner_are_one_lesion(neighbour):
    assert count_lesions(mask((5, 5, 5), neighbour), mask()).reference == 1
    assert count_lesions(mask((5, 5, 5), (5, 5, 7)), mask()).reference == 2


def test_corners_join_in_flat_masks_too():
    flat = mask((5, 5), (6, 6), (8, 8), shape=(10, 10))
    assert count_lesions(flat, flat) == LesionCounts(reference=2, prediction=2, found=2, false_positives=0)


def test_empty_masks_hold_no_lesions():
    some, none = mask((1, 1, 1), (5, 5, 5)), mask()
    assert count_lesions(none, none) == LesionCounts(0, 0, 0, 0)
    assert count_lesions(some, none) == LesionCounts(2, 0, 0, 0)
    assert count_lesions(none, some) == LesionCounts(0, 2, 0, 2)


def test_more_lesions_than_a_byte_counts_are_counted():
    many = np.zeros((40, 40, 40), dtype=bool)
    many[::2, ::2, ::2] = True
    assert count_lesions(many, many) == LesionCounts(8000, 8000, 8000, 0)


def test_lesion_classes_are_known_by_their_words():
    lesions = [
        "tumour", "Tumor", "liver_tumors", "LiverTumour", "enhancing tumor", "lung-nodules", "cyst", "Metastasis",
        "bone metastases", "colon cancer", "hepatocellular carcinoma", "adenocarcinoma", "WM lesion", "neoplasms",
    ]  # fmt: skip
    others = ["liver", "pancreas", "cystic duct", "peritumoral edema", "Anterior", "gallbladder", "left atrium", "1"]
    assert lesion_class_names([*lesions, *others]) == lesions
