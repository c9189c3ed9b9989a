from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.losses.rectification import dice_of_present_classes, disagreement, rectification


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def of_classes(*rows: list[float]) -> torch.Tensor:
    """Probabilities (1, C, V) of voxels given one after the other."""
    return torch.tensor(rows).T[None]


A = of_classes([0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.2, 0.7])
B = of_classes([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3])
LABEL = of_classes([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0])


def test_networks_disagree_where_their_most_probable_class_differs():
    assert disagreement(A, B, has_regions=False).tolist() == [[[False, True, True]]]


def test_regions_are_compared_each_by_itself():
    first, second = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]), torch.tensor([[[0.7, 0.6], [0.2, 0.3]]])
    assert disagreement(first, second, has_regions=True).tolist() == [[[False, True], [True, False]]]


def test_equal_hard_predictions_leave_nothing_to_rectify():
    sharper = A.square() / A.square().sum(1, keepdim=True)
    assert rectification(A, LABEL, disagreement(A, sharper, False)) == 0


def test_a_full_mask_is_the_mean_squared_error():
    p, label = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    full = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(rectification(p, label, full), functional.mse_loss(p, label))


def test_the_masked_error_is_divided_by_classes_times_voxels():
    # Voxel 2: (0.4, 0.5, 0.1) against class 1; voxel 3: (0.1, 0.2, 0.7) against class 2.
    expected = (0.4**2 + 0.5**2 + 0.1**2 + 0.1**2 + 0.2**2 + 0.3**2) / (3 * 2)
    assert float(rectification(A, LABEL, disagreement(A, B, False))) == pytest.approx(expected)


def test_the_masked_error_of_regions_is_divided_by_the_selected_entries():
    p, label = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    mask = torch.tensor([[[False, True], [True, False]]])
    assert float(rectification(p, label, mask)) == pytest.approx((0.4**2 + 0.1**2) / 2)


def test_the_judge_is_the_squared_dice_of_the_foreground():
    dice = [
        1 - 2 * 0.5 / (0.2**2 + 0.5**2 + 0.2**2 + 1),
        1 - 2 * 0.7 / (0.1**2 + 0.1**2 + 0.7**2 + 1),
    ]
    found = dice_of_present_classes(A, LABEL, torch.ones(1, 1, 3), False)
    assert float(found) == pytest.approx(sum(dice) / 2, rel=1e-4)


def test_the_judge_sums_over_the_batch():
    halves = [torch.cat([x[:, :, :2].repeat(1, 1, 1), x[:, :, 2:].repeat(1, 1, 2)]) for x in (A, LABEL)]
    whole = [x[:, :, [0, 1, 2, 2]] for x in (A, LABEL)]
    a = dice_of_present_classes(*halves, torch.ones(2, 1, 2), False)
    b = dice_of_present_classes(*whole, torch.ones(1, 1, 4), False)
    torch.testing.assert_close(a, b)


def test_an_absent_class_does_not_judge():
    label = of_classes([1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0])
    only_class_1 = 1 - 2 * 0.5 / (0.2**2 + 0.5**2 + 0.2**2 + 1)
    found = dice_of_present_classes(A, label, torch.ones(1, 1, 3), False)
    assert float(found) == pytest.approx(only_class_1, rel=1e-4)


def test_without_any_foreground_both_networks_are_equally_good():
    label = of_classes(*[[1.0, 0, 0]] * 3)
    assert dice_of_present_classes(A, label, torch.ones(1, 1, 3), False) == 0


def test_voxels_without_annotation_do_not_judge():
    annotated = torch.tensor([[[True, True, False]]])
    found = dice_of_present_classes(A, LABEL * annotated, annotated, False)
    torch.testing.assert_close(found, dice_of_present_classes(A[:, :, :2], LABEL[:, :, :2], annotated[:, :, :2], False))


def test_the_first_region_is_foreground():
    p, label = torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
    found = dice_of_present_classes(p, label, torch.ones(1, 1, 2), True)
    assert float(found) == pytest.approx(1 - 2 * 0.5 / 1.25, rel=1e-4)
