"""Which way round a mask lies on a CT is measured; what is unclear is not decided."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.orientation import (
    ABDOMEN_FLIPS,
    FlipScore,
    choose_flip,
    flip_by_header,
    flip_name,
    flipped,
    rank_flips,
)


def scores(**shares: float) -> list[FlipScore]:
    """Scores from shares by name: n as stored, else the axes, such as zy."""
    axes = {name: () if name == "n" else tuple("zyx".index(letter) for letter in name) for name in shares}
    made = [FlipScore(axes[name], share, 100, 20, 0, 0) for name, share in shares.items()]
    return sorted(made, key=lambda score: -score.share)


def chosen(expected: tuple[int, ...] | None = (), **shares: float) -> tuple[int, ...] | None:
    score = choose_flip(scores(**shares), expected)
    return None if score is None else score.axes


def test_measurements_are_those_of_the_voxels_under_the_mirrored_mask():
    image = np.zeros((2, 3, 4))
    image[1, 2, :] = [-300, 100, 400, 120]
    mask = np.zeros((2, 3, 4), bool)
    mask[1, 0, :] = True
    flipped_y, as_stored = rank_flips(image, mask, [(), (1,)])[::-1]
    assert (as_stored.axes, as_stored.share, as_stored.sd) == ((), 1, 0)
    assert (flipped_y.axes, flipped_y.share, flipped_y.gas, flipped_y.bone) == ((1,), 0.5, 0.25, 0.25)
    assert flipped_y.mean == pytest.approx(80)
    assert flipped_y.sd == pytest.approx(np.std([-300, 100, 400, 120]))


@pytest.mark.parametrize("flip", ABDOMEN_FLIPS)
def test_every_flip_of_an_abdomen_scores_as_the_mask_mirrored_by_numpy(abdomen, flip):
    phantom = abdomen(0)
    (score,) = rank_flips(phantom.image, phantom.mask, [flip])
    values = phantom.image[np.flip(phantom.mask, flip)]
    assert score.mean == pytest.approx(values.mean())
    assert score.share == pytest.approx(np.mean((values >= -50) & (values <= 200)))


@pytest.mark.parametrize("flip", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_a_mirrored_mask_of_an_abdomen_is_recognised(abdomen, flip, seed):
    phantom = abdomen(seed)
    ranked = rank_flips(phantom.image, np.flip(phantom.mask, flip))
    assert choose_flip(ranked).axes == flip
    assert ranked == sorted(ranked, key=lambda score: -score.share)


def test_soft_tissue_everywhere_tells_nothing(abdomen):
    mask = abdomen(0).mask
    assert choose_flip(rank_flips(np.full(mask.shape, 40), mask)) is None


def test_a_mask_on_fat_in_every_version_is_not_plausible(abdomen):
    mask = abdomen(0).mask
    assert choose_flip(rank_flips(np.full(mask.shape, -100), mask)) is None


def test_the_expected_version_needs_to_be_best_and_another_one_to_lead_clearly():
    assert chosen(n=0.96, z=0.93, y=0.5) == ()
    assert chosen(n=0.93, z=0.96, y=0.5) is None
    assert chosen(n=0.80, z=0.96, y=0.5) == (0,)
    assert chosen(n=0.93, z=0.96, y=0.5, expected=(0,)) == (0,)
    assert chosen(n=0.96, z=0.93, expected=None) is None
    assert chosen(n=0.96, z=0.83, expected=None) == ()


def test_a_change_needs_a_more_plausible_mask_than_the_expected_version():
    assert chosen(n=0.85, z=0.5) == ()
    assert chosen(n=0.5, z=0.85) is None
    assert chosen(n=0.75, z=0.5) is None


def test_equal_scores_decide_nothing():
    assert chosen(n=0.95, z=0.95) is None


def test_left_and_right_are_as_expected_unless_that_is_clearly_wrong():
    assert chosen(n=0.95, z=0.6, x=0.97) == ()
    assert chosen(n=0.95, z=0.6, x=0.94) == ()
    assert chosen(n=0.85, z=0.6, x=0.97) is None
    assert chosen(n=0.95, x=0.97, yx=0.6, expected=(2,)) == (2,)
    assert chosen(n=0.95) == ()
    assert chosen(n=0.95, expected=(2,)) is None


def test_different_shapes_and_empty_masks_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        rank_flips(np.zeros((2, 3, 4)), np.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match="empty"):
        rank_flips(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))


def test_flips_have_names():
    assert flip_name(()) == "as stored"
    assert flip_name((0, 1)) == "flipped along y and z"
    assert str(scores(zy=0.516)[0]) == "flipped along y and z 0.52"


def test_flipping_moves_voxels_and_leaves_the_header():
    label = sitk.GetImageFromArray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    label.SetOrigin((1, 2, 3))
    label.SetSpacing((1, 2, 4))
    result = flipped(label, (1,))
    assert np.array_equal(sitk.GetArrayFromImage(result), sitk.GetArrayFromImage(label)[:, ::-1])
    assert (result.GetOrigin(), result.GetSpacing()) == (label.GetOrigin(), label.GetSpacing())
    assert flipped(label, ()) is label


@pytest.mark.parametrize(
    ("signs", "flip"), [((1, 1, 1), ()), ((1, -1, 1), (1,)), ((1, -1, -1), (0, 1)), ((-1, -1, 1), (1, 2))]
)
def test_headers_tell_which_axes_run_against_each_other(signs, flip):
    image, label = sitk.Image(4, 5, 6, sitk.sitkUInt8), sitk.Image(4, 5, 6, sitk.sitkUInt8)
    label.SetDirection(np.diag(signs).astype(float).ravel().tolist())
    assert flip_by_header(label, image) == flip


def test_headers_with_other_axes_tell_no_flip():
    image, label = sitk.Image(4, 5, 6, sitk.sitkUInt8), sitk.Image(4, 5, 6, sitk.sitkUInt8)
    label.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, 1))
    assert flip_by_header(label, image) is None
