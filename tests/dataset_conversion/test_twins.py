from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from lgssl_nnunet.dataset_conversion import twins as module
from lgssl_nnunet.dataset_conversion.twins import (
    MIN_FOREGROUND,
    SAMPLE_SIZE,
    ImagePrint,
    Twins,
    find_twins,
    print_of,
    report,
    without_twins,
)
from lgssl_nnunet.errors import SplitError

SHAPE = (20, 24, 22)
SPACING = (1.0, 1.0, 1.0)


def scan(seed: int, shape=SHAPE) -> np.ndarray:
    """Two bright balls, at the same places for everybody, with a texture of one's own."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, length) for length in shape], indexing="ij"))
    ball = (np.square(grid).sum(axis=0) < 0.6).astype(np.float32)
    return (100 * ball + random.normal(0, 40, shape)).astype(np.float32)


def organ(seed: int, shape=SHAPE) -> np.ndarray:
    """A label as if drawn by hand: no symmetry."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[3:12, 4:15, 5:14] = random.random((9, 11, 9)) < 0.7
    return label


def twins_of(*cases, spacing=SPACING) -> list[Twins]:
    """Twins among cases a, b, c...; a case is an image, or an image and a label."""
    cases = [case if isinstance(case, tuple) else (case, None) for case in cases]
    return find_twins(
        {name: print_of(image, spacing, label) for name, (image, label) in zip("abcdef", cases, strict=False)}
    )


def reason(*cases) -> str | None:
    found = twins_of(*cases)
    return found[0].reason if found else None


def test_different_people_are_no_twins():
    assert twins_of(*[(scan(seed), organ(seed)) for seed in range(6)]) == []


def test_equal_images_are_found_whatever_data_type_and_memory_layout_they_have():
    whole = np.round(scan(0))
    fortran = np.asfortranarray(whole.astype(np.int16))
    assert twins_of(whole, scan(1), fortran[np.newaxis], whole.astype(np.float64)) == [
        Twins("a", "c", "equal images"),
        Twins("a", "d", "equal images"),
        Twins("c", "d", "equal images"),
    ]


def test_equal_images_with_different_spacing_are_found_and_named():
    prints = {"a": print_of(scan(0), (1, 1, 1)), "b": print_of(scan(0), (0.625, 0.625, 0.625))}
    assert [pair.reason for pair in find_twins(prints)] == ["equal images with different spacing"]


def test_a_copy_with_other_intensities_and_noise_is_nearly_equal():
    image = scan(0)
    noise = np.random.default_rng(9).normal(0, 0.12 * image.std(), image.shape)
    assert reason(image, 3 * image + 1000) == "nearly equal images, correlation 1.000"
    found = reason(image, scan(1), 1.3 * (image + noise) + 20)
    assert found.startswith("nearly equal images, correlation 0.99")


def test_too_much_noise_is_no_twin():
    image = scan(0)
    assert reason(image, image + np.random.default_rng(9).normal(0, 0.5 * image.std(), image.shape)) is None


def test_an_inverted_image_is_no_twin():
    assert reason(scan(0), -scan(0)) is None


def test_only_images_of_one_shape_are_compared():
    image = scan(0)
    assert reason(image, 2 * image[:-1]) is None
    assert reason(image, image.transpose(1, 0, 2)) is None


@pytest.mark.parametrize("outside", [0.0, -1024.0])
def test_a_common_outline_over_constant_background_makes_no_twins(outside):
    head = np.zeros(SHAPE, bool)
    head[3:-3, 3:-3, 3:-3] = True

    def stripped(seed: int) -> np.ndarray:
        return np.where(head, outside + 1000 + np.random.default_rng(seed).normal(0, 80, SHAPE), outside)

    first, second = stripped(0), stripped(1)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.96
    assert reason(first, second) is None
    assert reason(first, 2 * first + 5).startswith("nearly equal images")


def test_equal_labels_are_found_wherever_the_image_was_cropped():
    image, label = scan(0), organ(0)
    assert reason((image, label), (scan(1), label.astype(np.float32)[np.newaxis])) == "equal labels"
    assert reason((image, label), (image[2:, 3:, :-2], label[2:, 3:, :-2])) == "equal labels"


def test_labels_of_other_classes_are_not_equal():
    label = organ(0)
    assert reason((scan(0), label), (scan(1), 2 * label)) is None
    assert reason((scan(0), label.astype(np.int32)), (scan(1), label.astype(np.int32) + 256 * (label > 0))) is None


def test_boxes_and_balls_are_equal_labels_only_in_the_same_place():
    box, moved = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    box[2:8, 2:8, 2:8] = 1
    moved[3:9, 2:8, 2:8] = 1
    assert reason((scan(0), box), (scan(1), moved)) is None
    assert reason((scan(0), box), (scan(1), box)) == "equal labels"
    assert reason((scan(0), box), (scan(1)[1:], moved[1:])) is None


def test_empty_and_tiny_labels_mean_nothing():
    empty = np.zeros(SHAPE, np.uint8)
    assert print_of(scan(0), SPACING, empty).label is None
    flat = empty.ravel()
    flat[:: flat.size // (MIN_FOREGROUND - 2)][: MIN_FOREGROUND - 1] = 1
    flat[flat.nonzero()[0][MIN_FOREGROUND - 1 :]] = 0
    assert print_of(scan(0), SPACING, flat.reshape(SHAPE)).label is None
    flat[-1] = flat[-2] = 1
    assert print_of(scan(0), SPACING, flat.reshape(SHAPE)).label is not None


def test_constant_images_are_no_twins_and_no_error():
    with np.errstate(all="raise"):
        assert twins_of(*[np.full(SHAPE, value, np.float32) for value in (0, 0, 7.3, 1e30)], scan(0)) == []
    assert print_of(np.zeros(SHAPE), SPACING).image is None


def test_an_almost_constant_image_is_still_told_by_its_hash():
    image = np.zeros((40, 40, 40), np.float32)
    image[0, 0, 0] = 1
    assert print_of(image, SPACING).sample.size == 0
    assert reason(image, image.copy()) == "equal images"


def test_two_values_alone_are_not_nearly_equal():
    mask = np.zeros(SHAPE, np.float32)
    mask[3:-3, 3:-3, 3:-3] = 1
    other = mask.copy()
    other[3, 3, 3] = 0
    assert reason(mask, other) is None


@pytest.mark.parametrize("shape", [(1, 64, 48), (64, 48), (1, 1, 48, 64)])
def test_planes_are_compared_like_volumes(shape):
    random = np.random.default_rng(0)
    image, other = random.normal(size=shape), random.normal(size=shape)
    assert twins_of(image, other, 2 * image + 1) == [Twins("a", "c", "nearly equal images, correlation 1.000")]
    label = random.random(shape) < 0.5
    assert reason((image, label), (other, label)) == "equal labels"


def test_channels_count_together_and_a_constant_one_does_no_harm():
    channels = np.stack([scan(0), 1000 * scan(1), np.full(SHAPE, 5, np.float32), scan(2)])
    scaled = channels * np.array([1, 3, 2, 0.5], np.float32).reshape(4, 1, 1, 1) + 1
    other = channels.copy()
    other[1], other[3] = 1000 * scan(3), scan(4)
    assert [(pair.first, pair.second) for pair in twins_of(channels, scaled, other)] == [("a", "b")]
    assert print_of(channels, SPACING).shape == SHAPE


def test_voxels_that_are_no_number_do_no_harm():
    image = scan(0)
    image[::5] = np.nan
    image[1, 2, 3] = np.inf
    assert np.isfinite(print_of(image, SPACING).sample).all()


def test_a_print_comes_back_from_json_as_it_was():
    written = print_of(scan(0), SPACING, organ(0))
    read = ImagePrint.from_json(json.loads(json.dumps(written.to_json())))
    assert read.to_json() == written.to_json()
    assert find_twins({"a": written, "b": read}) == [Twins("a", "b", "equal images")]
    blank = ImagePrint.from_json(json.loads(json.dumps(print_of(np.zeros(SHAPE), SPACING).to_json())))
    assert find_twins({"a": blank, "b": blank}) == []


def test_places_of_the_sample_are_inside_spread_out_and_never_change():
    shape = (512, 300, 20)
    places = module._places(shape)
    halves = np.stack([index * 2 // length for index, length in zip(places, shape, strict=True)])
    assert set(halves.ravel().tolist()) == {0, 1}
    assert len(np.unique(np.stack(places), axis=1).T) == SAMPLE_SIZE
    counts = np.unique(halves, axis=1, return_counts=True)[1]
    assert counts.min() > SAMPLE_SIZE / 8 * 0.9
    # Prints in manifests were taken at these places; if they move, plans.integrity must raise its manifest version.
    assert [index[:3].tolist() for index in places] == [[419, 326, 234], [201, 102, 3], [10, 1, 12]]


def test_many_cases_are_compared_in_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 700)  # no multiple of the number of cases
    samples = np.random.default_rng(0).normal(size=(5000, SAMPLE_SIZE)).astype(np.float16)
    samples[4321] = samples[17] + np.float16(0.1) * samples[18]
    samples[699] = samples[698]
    prints = {f"{k:04d}": ImagePrint(str(k), None, SHAPE, SPACING, row) for k, row in enumerate(samples)}
    found = [(pair.first, pair.second) for pair in find_twins(prints)]
    assert found == [("0017", "4321"), ("0698", "0699")]


def test_no_case_is_no_twin():
    assert find_twins({}) == []
    assert find_twins({"a": print_of(scan(0), SPACING)}) == []


def test_the_report_names_each_pair_and_counts_those_beyond_a_page(monkeypatch):
    twins = [Twins("a", "b", "equal images"), Twins("a", "c", "equal labels"), Twins("b", "c", "equal labels")]
    assert report(twins)[0] == "a and b (equal images) are probably the same scan."
    assert len(report(twins)) == 3
    monkeypatch.setattr(module, "MAX_LISTED", 1)
    assert report(twins)[1:] == ["There are 2 more pairs of twins."]
    assert report([]) == []


def test_training_loses_the_twins_of_validation_cases_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    training = ["d", "a", "b", "c"]
    assert without_twins(training, ["v", "w"], [["a", "v"], ["v", "c"], ["b", "d"]]) == ["d", "b"]
    assert "a is not trained on: its twin v" in caplog.text
    assert without_twins(training, ["v", "w"], []) == training


def test_a_training_without_any_case_left_is_refused():
    with pytest.raises(SplitError, match="Every training case"):
        without_twins(["a", "b"], ["v"], [["a", "v"], ["b", "v"]])
