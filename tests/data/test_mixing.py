from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.data.mixing import box_mask, fixed_boxes, random_boxes


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_a_box_of_two_thirds_of_the_published_patch_has_the_published_size():
    # methods.md section 11: 74 * 74 * 53 voxels for 112 x 112 x 80.
    boxes = fixed_boxes(torch.empty(2, 1, 112, 112, 80), 2 / 3)
    assert boxes.sum(dim=(1, 2, 3, 4)).tolist() == [74 * 74 * 53] * 2


def test_two_thirds_of_nine_are_six():
    assert fixed_boxes(torch.empty(1, 1, 9, 9), 2 / 3).sum() == 36


def test_a_box_is_one_block_inside_the_patch():
    (mask,) = box_mask(torch.empty(1, 2, 6, 7, 8), [[2, 3, 4]])
    where = mask[0].nonzero()
    extent = where.amax(dim=0) - where.amin(dim=0) + 1
    assert extent.tolist() == [2, 3, 4]
    assert len(where) == 24


def test_patches_of_a_batch_get_boxes_of_their_own():
    boxes = fixed_boxes(torch.empty(8, 1, 30, 30), 0.3)
    assert len({tuple(box.flatten().tolist()) for box in boxes}) > 1


@pytest.mark.parametrize("shape", [(40, 40), (20, 20, 20)])
def test_random_boxes_have_a_volume_between_the_limits(shape):
    shares = random_boxes(torch.empty(200, 1, *shape), 0.1, 0.4).float().flatten(1).mean(dim=1)
    assert shares.min() > 0.07
    assert shares.max() < 0.45
    assert shares.max() - shares.min() > 0.2


def test_a_box_may_be_the_whole_patch():
    assert random_boxes(torch.empty(2, 1, 5, 6), 1.0, 1.0).all()
    assert fixed_boxes(torch.empty(2, 1, 5, 6), 1.0).all()
