"""nnU-Net's own resampling is the reference."""

from __future__ import annotations

import numpy as np
import pytest
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from scipy import ndimage

from lgssl_nnunet.data import resampling
from lgssl_nnunet.data.resampling import nearest_axis, new_shape, resample_image, resample_labels

GRIDS = [
    ((20, 30, 25), (1, 1, 1), (1.3, 0.8, 1.1)),
    ((20, 30, 25), (1, 1, 1), (2, 2, 0.5)),
    ((20, 30, 25), (2, 1, 1), (2, 1.2, 0.9)),
    ((10, 30, 25), (5, 1, 1), (5, 1.2, 0.9)),
    ((10, 30, 25), (5, 1, 1), (2, 1.2, 0.9)),
    ((25, 10, 30), (1, 5, 1), (1, 2, 1)),
    ((30, 25, 10), (1, 1, 4), (1, 2, 1.1)),
    ((12, 30, 25), (1, 1, 1), (7, 1.2, 0.9)),
    ((10, 12, 11), (1, 1, 1), (0.3, 0.4, 0.35)),
    ((5, 1, 7), (1, 1, 1), (0.3, 1, 0.35)),
    ((1, 30, 25), (999, 1, 1), (999, 1.4, 0.7)),
    ((130, 12, 14), (1, 1, 1), (0.7, 1.2, 1.3)),
]


def smooth_image(shape, seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 1).astype(np.float32)


def smooth_labels(shape, classes=6) -> np.ndarray:
    """Return a map of -1 to `classes` - 2 with curved borders."""
    scores = [ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) for seed in range(classes)]
    return np.argmax(scores, axis=0).astype(np.int16) - 1


def stock(array, shape, spacing, target, **orders) -> np.ndarray:
    return resample_data_or_seg_to_shape(array[None], shape, spacing, target, force_separate_z=None, **orders)[0]


def smallest_dice(one, other) -> float:
    labels = np.union1d(one, other)
    return min(2 * ((one == n) & (other == n)).sum() / ((one == n).sum() + (other == n).sum()) for n in labels)


@pytest.mark.parametrize(("shape", "spacing", "target"), GRIDS)
def test_shape_and_thick_axis_are_those_of_nnunet(shape, spacing, target):
    assert new_shape(shape, spacing, target) == tuple(compute_new_shape(shape, spacing, target))
    for forced in (None, True, False):
        assert nearest_axis(spacing, target, forced) == determine_do_sep_z_and_axis(forced, spacing, target)[1]


@pytest.mark.parametrize(("shape", "spacing", "target"), GRIDS)
def test_images_are_those_of_nnunet(shape, spacing, target):
    image, size = smooth_image(shape), new_shape(shape, spacing, target)
    expected = stock(image, size, spacing, target, is_seg=False, order=3, order_z=0)
    found = resample_image(image, size, nearest_axis(spacing, target, None))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize(("shape", "spacing", "target"), GRIDS)
def test_labels_are_those_of_nnunet(shape, spacing, target):
    labels, size = smooth_labels(shape), new_shape(shape, spacing, target)
    expected = stock(labels.astype(np.float32), size, spacing, target, is_seg=True, order=1, order_z=0)
    found = resample_labels(labels, size, nearest_axis(spacing, target, None))
    assert found.dtype == labels.dtype
    assert smallest_dice(found, expected) >= 0.999


def test_ties_between_labels_are_settled_as_in_nnunet():
    labels = np.random.default_rng(0).integers(0, 4, (12, 12, 12)).astype(np.int16)  # no two neighbours alike
    for size in ((24, 24, 24), (6, 6, 6), (18, 18, 18)):
        spacing = [after / before for before, after in zip(labels.shape, size, strict=True)]
        expected = stock(labels.astype(np.float32), size, spacing, (1, 1, 1), is_seg=True, order=1, order_z=0)
        # Where scores of nnU-Net differ by rounding alone, the two may part.
        assert (resample_labels(labels, size, None) == expected).mean() > 0.98


def test_slabs_change_nothing_but_the_last_bits(monkeypatch):
    image, labels = smooth_image((40, 30, 25)), smooth_labels((40, 30, 25))
    whole = resample_image(image, (50, 25, 31), None), resample_labels(labels, (50, 25, 31), None)
    monkeypatch.setattr(resampling, "SLAB_BYTES", 1)
    monkeypatch.setattr(resampling, "_VOTES", 100)
    np.testing.assert_allclose(resample_image(image, (50, 25, 31), None), whole[0], atol=1e-6)
    np.testing.assert_array_equal(resample_labels(labels, (50, 25, 31), None), whole[1])


def test_the_same_image_gives_the_same_bytes_and_is_left_alone():
    image = smooth_image((20, 30, 25))
    before = image.tobytes()
    first = resample_image(image, (25, 21, 30), None)
    assert first.tobytes() == resample_image(image.transpose().copy().transpose(), (25, 21, 30), None).tobytes()
    assert image.tobytes() == before
