"""A slice's label travels through a volume, and nothing but that slice and the image is asked."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from lgssl_nnunet.plans import propagation
from lgssl_nnunet.plans.propagation import REGISTRATIONS, one_thread, propagate, register_with_simpleitk, smoothed

SPACING = (2.0, 0.8, 0.8)


def drifting_discs(slices: int = 13, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """An image with two organs whose outlines move slowly from slice to slice, and its label."""
    rows, columns = np.mgrid[:size, :size]
    label = np.zeros((slices, size, size), np.int16)
    for index in range(slices):
        label[index][(rows - 16 - 0.7 * index) ** 2 + (columns - 16) ** 2 < 60] = 1
        label[index][(rows - 18) ** 2 + (columns - 36 + 0.5 * index) ** 2 < 40] = 2
    noise = np.random.default_rng(0).normal(size=label.shape)
    image = gaussian_filter(np.array([0.0, 2.0, -2.0])[label], (0, 1, 1)) + 0.1 * noise
    return image.astype(np.float32), label


def dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    return 2 * np.sum((a == value) & (b == value)) / (np.sum(a == value) + np.sum(b == value))


def copying(fixed, moving, label, spacing):
    return label


@pytest.mark.parametrize("axis", [0, 2])
def test_shapes_that_move_slowly_are_recovered_from_one_slice(axis):
    image, label = (np.moveaxis(array, 0, axis) for array in drifting_discs())
    spacing = np.insert(SPACING[1:], axis, SPACING[0])
    with one_thread():
        found = propagate(image, label.take(6, axis), axis, 6, spacing, register_with_simpleitk)
    copied = propagate(image, label.take(6, axis), axis, 6, spacing, copying)
    assert found.dtype == np.int16
    assert np.array_equal(found.take(6, axis), label.take(6, axis))
    for value in (1, 2):
        assert dice(found, label, value) > 0.88
        assert dice(found.take(0, axis), label.take(0, axis), value) > dice(
            copied.take(0, axis), label.take(0, axis), value
        )


def test_it_takes_the_image_and_one_slice_and_no_other_label():
    assert list(inspect.signature(propagate).parameters) == [
        "image",
        "label",
        "axis",
        "position",
        "spacing",
        "register",
    ]
    image, label = drifting_discs()
    with pytest.raises(ValueError, match="broadcast"):
        propagate(image, label, 0, 6, SPACING, copying)


def test_each_slice_is_registered_to_the_one_before_it_outwards_from_the_labelled_one():
    image = np.arange(5, dtype=np.float32)[:, None, None] + np.random.default_rng(0).normal(size=(5, 12, 12)) * 1e-3
    seen = []

    def register(fixed, moving, label, spacing):
        seen.append((round(float(fixed.mean())), round(float(moving.mean())), spacing))
        return label

    label = np.zeros((12, 12), np.int16)
    label[3:9, 3:9] = 1
    found = propagate(image, label, 0, 2, SPACING, register)
    assert seen == [(3, 2, (0.8, 0.8)), (4, 3, (0.8, 0.8)), (1, 2, (0.8, 0.8)), (0, 1, (0.8, 0.8))]
    assert np.array_equal(found, np.broadcast_to(label, found.shape))


def test_propagation_ends_where_nothing_is_left_of_the_label():
    image = np.random.default_rng(0).normal(size=(6, 12, 12)).astype(np.float32)
    calls = []

    def losing(fixed, moving, label, spacing):
        calls.append(1)
        return np.zeros_like(label)

    label = np.zeros((12, 12), np.int16)
    label[3:9, 3:9] = 1
    found = propagate(image, label, 0, 2, SPACING, losing)
    assert len(calls) == 2  # one in each direction
    assert set(np.flatnonzero(found.any(axis=(1, 2)))) == {2}
    assert not propagate(image, np.zeros_like(label), 0, 2, SPACING, losing).any()
    assert len(calls) == 2


def test_the_label_is_opened_and_closed_after_every_step_and_the_labelled_slice_stays():
    label = np.zeros((20, 20), np.int16)
    label[4:16, 4:12] = 1
    smooth = label.copy()
    label[9, 12:16] = 1  # a spike

    def growing(fixed, moving, label, spacing):
        carried = label.copy()
        carried[2:5, 7] = 1  # another one
        return carried

    found = propagate(np.random.default_rng(0).normal(size=(4, 20, 20)), label, 0, 1, SPACING, growing)
    assert np.array_equal(found, np.stack([smooth, label, smooth, smooth]))


def test_slices_without_contrast_or_too_thin_to_register_take_the_label_over():
    label = np.ones((12, 12), np.int16)

    def fails(fixed, moving, label, spacing):
        raise AssertionError

    assert propagate(np.zeros((3, 12, 12), np.float32), label, 0, 1, SPACING, fails).all()
    thin = np.random.default_rng(0).normal(size=(3, 3, 12))
    assert propagate(thin, np.ones((3, 12), np.int16), 0, 1, SPACING, fails).all()


def test_only_the_surroundings_of_the_label_are_registered(monkeypatch):
    monkeypatch.setattr(propagation, "_MARGIN", 2)
    shapes = []

    def register(fixed, moving, label, spacing):
        shapes.append(fixed.shape)
        return label

    label = np.zeros((30, 40), np.int16)
    label[10:16, 0:7] = 1
    propagate(np.random.default_rng(0).normal(size=(2, 30, 40)), label, 0, 0, SPACING, register)
    assert shapes == [(10, 9)]


def test_each_class_is_opened_and_closed_by_five_voxels():
    label = np.zeros((30, 50), np.int16)
    label[5:15, 5:15] = 1
    label[6:24, 25:43] = 2
    expected = label.copy()
    label[9, 15:20] = 1  # a spike, which opening removes
    label[14:16, 33:35] = 0  # a hole, which closing fills
    assert np.array_equal(smoothed(label), expected)


def test_a_class_at_the_rim_of_the_slice_is_not_shaved_and_one_too_thin_to_open_is_kept():
    label = np.zeros((20, 20), np.int16)
    label[:6, :6] = 1
    label[12:14, 4:16] = 2
    assert np.array_equal(smoothed(label), label)


@pytest.mark.parametrize(("outer", "inner"), [(1, 2), (2, 1)])
def test_a_class_does_not_close_over_another_one(outer, inner):
    label = np.zeros((24, 24), np.int16)
    label[2:22, 2:22] = outer
    label[10:13, 10:13] = inner
    assert np.array_equal(smoothed(label), label)


def test_an_affine_search_that_runs_away_is_not_followed(monkeypatch):
    monkeypatch.setattr(propagation, "_DEMONS_ITERATIONS", 0)
    rising = np.outer(np.arange(20.0), np.ones(16))
    label = np.zeros((20, 16), np.int16)
    label[6:14, 4:12] = 1
    with one_thread():
        assert np.array_equal(register_with_simpleitk(-rising, rising, label, (1.0, 1.0)), label)


def test_registration_repeats_itself_to_the_bit():
    image, label = drifting_discs(3)
    with one_thread():
        first, second = (propagate(image, label[1], 0, 1, SPACING, register_with_simpleitk) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_number_of_threads_is_given_back():
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    with one_thread():
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before


def test_ants_recovers_the_same_shapes():
    pytest.importorskip("ants")
    image, label = drifting_discs(5)
    found = propagate(image, label[2], 0, 2, SPACING, REGISTRATIONS["ants"])
    for value in (1, 2):
        assert dice(found, label, value) > 0.85
