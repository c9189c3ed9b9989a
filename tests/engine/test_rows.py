from __future__ import annotations

import torch

from lgssl_nnunet.engine.batches import finest, rows


def test_the_finest_of_several_scales_is_the_first_and_a_single_one_is_itself():
    scales = [torch.randn(4, 2, 8, 8), torch.randn(4, 2, 4, 4)]
    assert finest(scales) is scales[0]
    assert finest(scales[1]) is scales[1]


def test_rows_are_taken_at_every_scale():
    scales = [torch.randn(4, 2, 8, 8), torch.randn(4, 2, 4, 4)]
    for found, scale in zip(rows(scales, slice(1, None)), scales, strict=True):
        assert torch.equal(found, scale[1:])
    assert torch.equal(rows(scales[0], slice(2)), scales[0][:2])
