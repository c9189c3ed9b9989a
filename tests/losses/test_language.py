"""The ties between words and image positions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.losses.language import alignment, class_map_loss

# Four voxels in a row, three classes, seen by a map of two positions: shares (1, 0, 0) and (0, 1/2, 1/2).
LABELS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])[None, :, None]
EVERYWHERE = torch.ones(1, 1, 1, 4, dtype=torch.bool)
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[None, :, None]


def test_the_class_map_loss_is_the_cross_entropy_with_the_shares():
    first = -math.log(math.exp(2) / (math.exp(2) + 2))
    total = math.log(1 + math.exp(1) + math.exp(-1))
    second = -0.5 * (1 - total) - 0.5 * (-1 - total)
    found = class_map_loss([LOGITS], LABELS, EVERYWHERE, exclusive=True)
    assert float(found) == pytest.approx((first + second) / 2)


def test_several_maps_are_averaged():
    finer = torch.zeros(1, 3, 1, 4)
    coarse = class_map_loss([LOGITS], LABELS, EVERYWHERE, exclusive=True)
    found = class_map_loss([LOGITS, finer], LABELS, EVERYWHERE, exclusive=True)
    assert float(found) == pytest.approx((float(coarse) + math.log(3)) / 2)


def test_regions_are_asked_one_by_one():
    def entropy(share, logit):
        p = 1 / (1 + math.exp(-logit))
        return -share * math.log(p) - (1 - share) * math.log(1 - p)

    expected = [entropy(1, 2), entropy(0, 0), entropy(0, 0), entropy(0, 0), entropy(0.5, 1), entropy(0.5, -1)]
    found = class_map_loss([LOGITS], LABELS, EVERYWHERE, exclusive=False)
    assert float(found) == pytest.approx(sum(expected) / 6)


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_is_not_annotated_does_not_count(exclusive):
    known = torch.tensor([True, True, False, False])[None, None, None]
    found = class_map_loss([LOGITS], LABELS * known, known, exclusive)
    half = class_map_loss([LOGITS[..., :1]], LABELS[..., :2], EVERYWHERE[..., :2], exclusive)
    assert float(found) == pytest.approx(float(half))
    assert float(class_map_loss([LOGITS], LABELS * 0, ~EVERYWHERE, exclusive)) == 0


def test_the_alignment_is_the_distance_of_unit_vectors():
    # Class 0 has the mean feature (3, 4), classes 1 and 2, half a position each, have (7, 7).
    feature = torch.tensor([[3.0, 7.0], [4.0, 7.0]])[None, :, None]
    prompts = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    # (0.6, 0.8) and (1, 0).
    assert float(alignment(feature, prompts, LABELS)) == pytest.approx((0.4**2 + 0.8**2) / 3)


@pytest.mark.parametrize(("voxels", "counts"), [(7, False), (8, True)])
def test_a_class_counts_from_an_eighth_of_a_coarse_position_on(voxels, counts):
    labels = torch.zeros(1, 2, 4, 4, 4)
    labels[0, 1].view(-1)[:voxels] = 1
    feature = torch.ones(1, 2, 1, 1, 1, requires_grad=True)
    alignment(feature, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels).backward()
    assert bool(feature.grad.any()) == counts


def test_the_alignment_averages_over_the_classes_that_are_there():
    feature = torch.tensor([[3.0, 7.0], [4.0, 0.0]])[None, :, None]
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0] * 4])[None, :, None]
    prompts = torch.tensor([[0.3, 0.4], [-1.0, 0.0], [1.0, 1.0]])
    assert float(alignment(feature, prompts, labels)) == pytest.approx((0 + 4) / 2)
    assert float(alignment(feature, prompts, labels * 0)) == 0


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 8)])
def test_both_work_in_two_and_three_dimensions_and_in_half_precision(shape):
    labels = torch.nn.functional.one_hot(torch.randint(3, (2, *shape)), 3).movedim(-1, 1)
    coarse = [size // 2 for size in shape]
    logits = torch.randn(2, 3, *coarse, dtype=torch.bfloat16, requires_grad=True)
    feature = torch.randn(2, 5, *coarse, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tied = class_map_loss([logits], labels, torch.ones(2, 1, *shape), exclusive=True)
        aligned = alignment(feature, torch.randn(3, 5), labels)
    assert tied.dtype == aligned.dtype == torch.float32
    (tied + aligned).backward()
    assert torch.isfinite(logits.grad).all()
    assert feature.grad.abs().max() > 0
