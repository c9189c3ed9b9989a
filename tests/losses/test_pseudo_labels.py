from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.losses.pseudo_labels import confidence, cross_entropy, hard_labels, sharpened


def voxel(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def test_hard_labels_are_one_hot_for_classes_and_thresholded_for_regions():
    p = voxel(0.2, 0.6, 0.55)
    assert hard_labels(p, False).flatten().tolist() == [0, 1, 0]
    assert hard_labels(p, True).flatten().tolist() == [0, 1, 1]
    assert not hard_labels(p.requires_grad_(), False).requires_grad


def test_the_confidence_of_a_region_is_that_of_its_predicted_side():
    p = voxel(0.1, 0.7)
    assert confidence(p, False).flatten().tolist() == pytest.approx([0.7])
    assert confidence(p, True).flatten().tolist() == pytest.approx([0.9, 0.7])


def test_sharpening_two_classes_is_the_power_formula():
    # methods.md section 4: sharp_0.1(0.6) = 0.982954.
    logits = torch.log(voxel(0.6, 0.4))
    assert sharpened(logits, 0.1, False).flatten()[0].item() == pytest.approx(0.982954, abs=1e-6)
    region = torch.log(voxel(0.6) / voxel(0.4))
    assert sharpened(region, 0.1, True).item() == pytest.approx(0.982954, abs=1e-6)


def test_sharpening_keeps_the_order_of_many_classes():
    # methods.md section 4: (0.40, 0.35, 0.25) becomes (0.786, 0.207, 0.007).
    found = sharpened(torch.log(voxel(0.40, 0.35, 0.25)), 0.1, False).flatten()
    assert found.tolist() == pytest.approx([0.786, 0.207, 0.007], abs=1e-3)


def test_sharpening_does_not_underflow_in_half_precision():
    extreme = voxel(30.0, -30.0, 0.0).bfloat16()
    assert torch.equal(sharpened(extreme, 0.1, False).flatten(), torch.tensor([1.0, 0.0, 0.0]))


def test_cross_entropy_of_hard_labels_is_that_of_torch():
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    one_hot = functional.one_hot(classes, 4).movedim(-1, 1)
    expected = functional.cross_entropy(logits, classes, reduction="none")[:, None]
    torch.testing.assert_close(cross_entropy(logits, one_hot, False), expected)


def test_cross_entropy_of_regions_is_binary_per_channel():
    assert cross_entropy(voxel(0.0, 0.0), voxel(1.0, 0.0), True).flatten().tolist() == pytest.approx([math.log(2)] * 2)


def test_cross_entropy_of_soft_labels_is_least_where_both_agree():
    target = voxel(0.7, 0.3)
    at_target = cross_entropy(torch.log(target), target, False).item()
    assert at_target == pytest.approx(-(0.7 * math.log(0.7) + 0.3 * math.log(0.3)))
    assert cross_entropy(torch.log(voxel(0.5, 0.5)), target, False).item() > at_target
