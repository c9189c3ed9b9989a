from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from lgssl_nnunet.plans.sidedness import LeftRight, find_sides, left_right, sided_pairs

IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)
OPPOSITE = (-1, 0, 0, 0, 1, 0, 0, 0, 1)
SAGITTAL = (0, 0, 1, 1, 0, 0, 0, 1, 0)  # the third index axis (array axis 0) runs from left to right
OBLIQUE = (0.7071, -0.7071, 0, 0.7071, 0.7071, 0, 0, 0, 1)
SIDED = [["background", "left kidney", "right kidney"]]


@pytest.fixture
def image(raw_dataset):
    def write(name, direction):
        writer = raw_dataset(labeled=0, unlabeled=0, in_images_un=0, test=0)
        writer.add(name, direction=direction)
        return writer.image_file(name)

    return write


@pytest.mark.parametrize(
    ("texts", "number"),
    [
        (["left kidney", "right kidney"], 1),
        (["kidney_L", "kidney_R", "liver"], 1),
        (["KidneyLeft", "KidneyRight"], 1),
        (["left atrium"], 0),
        (["left atrium", "right atrium"], 1),
        (["left atrium", "right ventricle"], 0),
        (["A computerized tomography of a left lung", "A computerized tomography of a right lung"], 1),
        (["bright lesion", "leftover lesion"], 0),
        (["left lung", "right lung", "left kidney", "right kidney"], 2),
    ],
)
def test_sides_count_only_in_pairs_of_one_structure(texts, number):
    assert len(sided_pairs(texts)) == number


@pytest.mark.parametrize(
    ("direction", "lying"),
    [(IDENTITY, LeftRight(2, 1)), (OPPOSITE, LeftRight(2, -1)), (SAGITTAL, LeftRight(0, 1)), (OBLIQUE, None)],
)
def test_the_direction_of_the_image_tells_axis_and_sign(image, direction, lying):
    assert left_right(image("a", direction), "SimpleITKIO") == lying


def test_readers_that_reorient_have_a_fixed_axis_and_other_formats_none(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    assert left_right(tmp_path / "a.png", "SimpleITKIOWithReorient") == LeftRight(2, 1)
    assert left_right(tmp_path / "a.png", "NaturalImage2DIO") is None


def test_without_sides_nothing_is_decided(image):
    assert find_sides([["liver", "left atrium"]], {"a": image("a", IDENTITY)}, "SimpleITKIO", [0, 1, 2]) == (None, None)


def test_the_blocked_axis_is_given_in_the_order_of_the_plans(image, caplog):
    caplog.set_level(logging.INFO)
    images = {"a": image("a", IDENTITY)}
    assert find_sides(SIDED, images, "SimpleITKIO", [0, 1, 2]).axes == [0, 1]
    assert find_sides(SIDED, images, "SimpleITKIO", [2, 0, 1]).axes == [1, 2]
    assert "'left kidney' and 'right kidney'" in caplog.text


def test_how_the_images_lie_is_kept_where_they_agree(image):
    one, other = image("a", IDENTITY), image("b", OPPOSITE)
    assert find_sides(SIDED, {"a": one}, "SimpleITKIO", [2, 0, 1]).lying == LeftRight(2, 1)
    assert find_sides(SIDED, {"b": other}, "SimpleITKIO", [0, 1, 2]).lying == LeftRight(2, -1)
    assert find_sides(SIDED, {"a": one, "b": other}, "SimpleITKIO", [0, 1, 2]).lying is None
    assert find_sides([["liver"]], {"a": one}, "SimpleITKIO", [0, 1, 2]).lying is None


def test_prompts_reveal_sides_that_names_hide(image):
    texts = [["kidney 1", "kidney 2"], ["the left kidney", "the right kidney"]]
    assert find_sides(texts, {"a": image("a", IDENTITY)}, "SimpleITKIO", [0, 1, 2]).axes == [0, 1]


def test_images_that_disagree_switch_mirroring_off_altogether(image, caplog):
    images = {"a": image("a", IDENTITY), "b": image("b", SAGITTAL)}
    assert find_sides(SIDED, images, "SimpleITKIO", [0, 1, 2]).axes == []
    assert "array axis 2 in a" in caplog.text
    assert "array axis 0 in b" in caplog.text


def test_images_that_do_not_tell_switch_mirroring_off_altogether(image, caplog):
    assert find_sides(SIDED, {"a": image("a", OBLIQUE)}, "SimpleITKIO", [0, 1, 2]).axes == []
    assert "do not say" in caplog.text


def test_images_stored_in_opposite_directions_are_named_and_keep_the_axis_blocked(image, caplog):
    images = {name: image(name, IDENTITY) for name in ("a", "b")} | {"c": image("c", OPPOSITE)}
    assert find_sides(SIDED, images, "SimpleITKIO", [0, 1, 2]).axes == [0, 1]
    assert "in c the patient's left lies on the other side" in caplog.text
    caplog.clear()
    assert find_sides(SIDED, images, "SimpleITKIOWithReorient", [0, 1, 2]).axes == [0, 1]
    assert "other side" not in caplog.text


def test_sides_without_a_pair_are_said_and_change_nothing(image, caplog):
    texts = ["kidney on the left of the spine", "kidney on the right, below the liver"]
    assert find_sides([texts], {"a": image("a", IDENTITY)}, "SimpleITKIO", [0, 1, 2]) == (None, None)
    assert "name them alike" in caplog.text
